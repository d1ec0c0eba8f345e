#!/usr/bin/env bash
# Fashion-MNIST, halved to 14 × 14: two peers with a ResNet-8, on the processor.
#
#   DATA=data/fashion OUT=outputs/fashion SEED=1 bash recipes/fashion_mnist/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --batch-size to GPUS_PER_PEER; a peer's batch stays the same.
# With METHOD=all_reduce, EPOCHS=18 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/fashion_mnist" -- \
    codistill-launch --peers 2 --gpus-per-peer 0 -- \
    fairseq-train "$DATA" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill/seed$SEED" --seed "$SEED" \
    --task image_classification --arch resnet8 --augmentation none --image-size 14 \
    --image-fraction 1 --log-init-distance --image-resize 14 --image-channels 1 --image-cache \
    --criterion codistill_ce --codistill-interval 100 --codistill-loss mse --codistill-alpha 0.1 \
    --codistill-alpha-schedule constant --codistill-wait 0 --codistill-wire-dtype fp32 --codistill-burn-in 0 \
    --codistill-sync --optimizer sgd_nesterov --momentum 0.9 --no-decay-norm-bias \
    --lr-scheduler multistep --lr 0.05 --warmup-epochs 0.1667 --warmup-init-lr 0.05 --weight-decay 1e-2 \
    --max-epoch 3 --lr-milestones 1,2,2.6667 --batch-size 128 --update-freq 1 \
    --validate-interval-updates 160 --save-interval-updates 160 --keep-interval-updates 1 \
    --validate-interval 1000000 --save-interval 1000000 \
    --best-checkpoint-metric top1 --maximize-best-checkpoint-metric \
    --log-format json --log-interval 160 --num-workers 0 --clip-norm 5 --cpu \
    -- "$@"
