#!/usr/bin/env bash
# Your own text and languages (prepare.py own): two peers with fairseq's transformer_iwslt_de_en.
#
#   DATA=data/own OUT=outputs/own SEED=1 bash recipes/own/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --update-freq to the GPUs that there are; the batch stays the same.
# With METHOD=all_reduce, UPDATES=1000 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/own" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill_ce/seed$SEED" --seed "$SEED" \
    --task translation --arch transformer_iwslt_de_en --share-all-embeddings --dropout 0.3 \
    --criterion codistill_ce --codistill-interval 500 --codistill-loss ce --codistill-alpha 0.3 \
    --codistill-alpha-schedule exponential --codistill-gamma 1.1 --codistill-wait 0 --codistill-alpha-warmup-epochs 4 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.0001 --lr 5e-4 --lr-scheduler inverse_sqrt \
    --warmup-updates 4000 --warmup-init-lr 1e-07 \
    --max-tokens 4096 --max-tokens-valid 4096 --required-batch-size-multiple 1 --update-freq 1 --max-update 20000 \
    --validate-interval-updates 500 --save-interval-updates 500 --keep-interval-updates 5 \
    --validate-interval 1000000 --save-interval 1000000 --best-checkpoint-metric loss \
    --log-format json --log-interval 100 --num-workers 1 \
    -- "$@"
