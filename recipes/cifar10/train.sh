#!/usr/bin/env bash
# CIFAR-10: two peers with a ResNet-20.
#
#   DATA=data/cifar10 OUT=outputs/cifar10 SEED=1 bash recipes/cifar10/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --batch-size to GPUS_PER_PEER; a peer's batch stays the same.
# With METHOD=all_reduce, EPOCHS=18 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/cifar10" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill/seed$SEED" --seed "$SEED" \
    --task image_classification --arch resnet20 --augmentation small --image-size 32 \
    --image-fraction 1 --log-init-distance --image-cache \
    --criterion codistill_ce --codistill-interval 400 --codistill-loss mse --codistill-alpha 1.0 \
    --codistill-alpha-schedule stepwise --codistill-wait 0 --codistill-wire-dtype fp32 --codistill-burn-in 0 \
    --codistill-sync --codistill-milestones 30,60,80 --optimizer sgd_nesterov --momentum 0.9 --no-decay-norm-bias \
    --lr-scheduler multistep --lr 0.1 --warmup-epochs 5 --warmup-init-lr 0.1 --weight-decay 5e-4 --max-epoch 90 \
    --lr-milestones 30,60,80 --batch-size 128 --update-freq 1 \
    --validate-interval-updates 1000 --save-interval-updates 1000 --keep-interval-updates 1 \
    --validate-interval 1000000 --save-interval 1000000 \
    --best-checkpoint-metric top1 --maximize-best-checkpoint-metric \
    --log-format json --log-interval 1000 --num-workers 4 \
    -- "$@"
