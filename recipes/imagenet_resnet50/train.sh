#!/usr/bin/env bash
# ImageNet: two peers with a ResNet-50, 45 epochs each (Sodhani et al., section 3).
#
#   DATA=data/imagenet OUT=outputs/imagenet SEED=1 bash recipes/imagenet_resnet50/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --batch-size to GPUS_PER_PEER; a peer's batch stays the same.
# With METHOD=all_reduce, EPOCHS=18 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/imagenet_resnet50" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill/seed$SEED" --seed "$SEED" \
    --task image_classification --arch resnet50 --augmentation imagenet --image-size 224 \
    --image-fraction 1 --log-init-distance --image-mean 0.485,0.456,0.406 --image-std 0.229,0.224,0.225 \
    --criterion codistill_ce --codistill-interval 2500 --codistill-loss mse --codistill-alpha 1.0 \
    --codistill-alpha-schedule stepwise --codistill-wait 0 --codistill-wire-dtype fp32 --codistill-burn-in 0 \
    --codistill-sync --codistill-milestones 15,30,40 --optimizer sgd_nesterov --momentum 0.9 --no-decay-norm-bias \
    --lr-scheduler multistep --lr 0.1 --warmup-epochs 2.5 --warmup-init-lr 0.1 --weight-decay 1e-4 --max-epoch 45 \
    --lr-milestones 15,30,40 --batch-size 256 --update-freq 1 \
    --validate-interval-updates 5000 --save-interval-updates 5000 --keep-interval-updates 1 \
    --validate-interval 1000000 --save-interval 1000000 \
    --best-checkpoint-metric top1 --maximize-best-checkpoint-metric \
    --log-format json --log-interval 5000 --num-workers 4 \
    -- "$@"
