#!/usr/bin/env bash
# WMT's news test sets as a small corpus: two peers.
#
#   DATA=data/newstest OUT=outputs/newstest SEED=1 bash recipes/newstest_de_en/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --update-freq to the GPUs that there are; the batch stays the same.
# With METHOD=all_reduce, UPDATES=1000 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/newstest_de_en" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill_ce/seed$SEED" --seed "$SEED" \
    --task translation --source-lang de --target-lang en --arch transformer --share-all-embeddings \
    --encoder-layers 3 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --encoder-attention-heads 4 \
    --decoder-layers 3 --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024 --decoder-attention-heads 4 \
    --dropout 0.2 \
    --criterion codistill_ce --codistill-interval 50 --codistill-loss ce --codistill-alpha 1.0 \
    --codistill-alpha-schedule constant --codistill-gamma 1.1 --codistill-wait 0 --codistill-alpha-warmup-epochs 0 --codistill-sync \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 400 \
    --max-tokens 2048 --max-tokens-valid 4000 --required-batch-size-multiple 1 --update-freq 1 --max-update 4000 \
    --validate-interval-updates 200 --save-interval-updates 200 --keep-interval-updates 5 \
    --validate-interval 1000000 --save-interval 1000000 --best-checkpoint-metric loss \
    --log-format json --log-interval 200 --num-workers 0 \
    -- "$@"
