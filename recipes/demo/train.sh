#!/usr/bin/env bash
# The demo's two peers, on the grammar's corpus. `make demo` trains them beside three baselines.
#
#   DATA=demo/data OUT=demo/runs SEED=1 bash recipes/demo/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --update-freq to the GPUs that there are; the batch stays the same.
# With METHOD=all_reduce, UPDATES=1000 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/demo" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill_ce/seed$SEED" --seed "$SEED" \
    --task translation --source-lang en --target-lang de --arch transformer --share-all-embeddings \
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4 \
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4 --dropout 0 \
    --criterion codistill_ce --codistill-interval 50 --codistill-loss ce --codistill-alpha 0.3 \
    --codistill-alpha-schedule exponential --codistill-gamma 1.1 --codistill-wait 0 --codistill-alpha-warmup-epochs 4 \
    --codistill-wire-dtype fp32 \
    --codistill-sync --optimizer adam --adam-betas '(0.9, 0.98)' --lr 3e-3 --lr-scheduler inverse_sqrt \
    --warmup-updates 200 --max-tokens 700 --max-tokens-valid 4000 --required-batch-size-multiple 1 \
    --update-freq 1 --max-update 900 \
    --validate-interval-updates 100 --save-interval-updates 100 --keep-interval-updates 1 \
    --validate-interval 1000000 --save-interval 1000000 --best-checkpoint-metric loss \
    --log-format json --log-interval 100 --num-workers 0 \
    -- "$@"
