#!/usr/bin/env bash
# scikit-learn's digits, 8 × 8: two peers with a ResNet-8, in a minute on one core.
#
#   DATA=data/digits OUT=outputs/digits SEED=1 bash recipes/digits/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --batch-size to GPUS_PER_PEER; a peer's batch stays the same.
# With METHOD=all_reduce, EPOCHS=18 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/digits" -- \
    codistill-launch --peers 2 --gpus-per-peer 0 -- \
    fairseq-train "$DATA" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill/seed$SEED" --seed "$SEED" \
    --task image_classification --arch resnet8 --augmentation none --image-size 8 \
    --image-fraction 1 --log-init-distance --image-channels 1 --image-cache \
    --criterion codistill_ce --codistill-interval 20 --codistill-loss mse --codistill-alpha 1.0 \
    --codistill-alpha-schedule constant --codistill-wait 0 --codistill-wire-dtype fp32 --codistill-burn-in 0 \
    --codistill-sync --optimizer sgd_nesterov --momentum 0.9 --no-decay-norm-bias \
    --lr-scheduler multistep --lr 0.1 --warmup-epochs 0.5 --warmup-init-lr 0.1 --weight-decay 3e-3 --max-epoch 9 \
    --lr-milestones 3,6,8 --batch-size 32 --update-freq 1 \
    --validate-interval-updates 40 --save-interval-updates 40 --keep-interval-updates 1 \
    --validate-interval 1000000 --save-interval 1000000 \
    --best-checkpoint-metric top1 --maximize-best-checkpoint-metric \
    --log-format json --log-interval 40 --num-workers 0 --cpu \
    -- "$@"
