#!/usr/bin/env bash
# Tatoeba German–English: two peers with a transformer that is wide for sentences of some eight words.
#
#   DATA=data/tatoeba OUT=outputs/tatoeba SEED=1 bash recipes/tatoeba_de_en/train.sh [more options of fairseq-train]
#
# ../run.py runs the command below: a run that was stopped goes on, a finished one is left alone. It fits
# --gpus-per-peer and --update-freq to the GPUs that there are; the batch stays the same.
# With METHOD=all_reduce, UPDATES=1000 or another setting of recipe.toml in the environment it makes that run's command instead,
# and with DRY_RUN=1 it prints the command and starts nothing.
set -eo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SEED="${SEED:-1}"

exec "${PYTHON:-python3}" "$root/recipes/run.py" train "$root/recipes/tatoeba_de_en" -- \
    codistill-launch --peers 2 -- \
    fairseq-train "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$OUT/codistill_ce/seed$SEED" --seed "$SEED" \
    --task translation --source-lang de --target-lang en --arch transformer --share-all-embeddings \
    --encoder-layers 3 --encoder-embed-dim 512 --encoder-ffn-embed-dim 2048 --encoder-attention-heads 8 \
    --decoder-layers 3 --decoder-embed-dim 512 --decoder-ffn-embed-dim 2048 --decoder-attention-heads 8 \
    --dropout 0.1 \
    --criterion codistill_ce --codistill-interval 100 --codistill-loss ce --codistill-alpha 1.0 \
    --codistill-alpha-schedule constant --codistill-gamma 1.1 --codistill-wait 0 --codistill-alpha-warmup-epochs 0 --codistill-sync \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-updates 1000 \
    --max-tokens 4096 --max-tokens-valid 8000 --required-batch-size-multiple 1 --update-freq 1 --max-update 8000 \
    --validate-interval-updates 250 --save-interval-updates 250 --keep-interval-updates 5 \
    --validate-interval 1000000 --save-interval 1000000 --best-checkpoint-metric loss \
    --log-format json --log-interval 250 --num-workers 0 \
    -- "$@"
