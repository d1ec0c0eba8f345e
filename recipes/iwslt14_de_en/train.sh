#!/usr/bin/env bash
# IWSLT'14 German–English: two peers with Transformer-big, which is too large for it (Sodhani et al., section 4).
#
#   DATA=data/iwslt14 OUT=outputs/iwslt14 SEED=1 bash recipes/iwslt14_de_en/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --update-freq to the GPUs that there are; the batch stays the same.
# With METHOD=all_reduce, UPDATES=1000 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/iwslt14_de_en" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill_mse/seed$SEED" \
    --seed "$SEED" --task translation --source-lang de --target-lang en \
    --arch transformer_wmt_en_de_big --share-all-embeddings --dropout 0.3 \
    --criterion codistill_ce --codistill-interval 500 --codistill-loss mse --codistill-alpha 0.1 \
    --codistill-alpha-schedule exponential --codistill-gamma 1.1 --codistill-wait 0 --codistill-alpha-warmup-epochs 0 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.0 --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-07 --fp16 \
    --max-tokens 4096 --max-tokens-valid 4096 --required-batch-size-multiple 1 --update-freq 1 --max-update 17500 \
    --validate-interval-updates 500 --save-interval-updates 500 --keep-interval-updates 10 \
    --validate-interval 1000000 --save-interval 1000000 --best-checkpoint-metric loss \
    --log-format json --log-interval 100 --num-workers 1 \
    -- "$@"
