#!/usr/bin/env bash
# Train one run of a translation recipe. Start it through the recipe, which sets the experiment's defaults:
# METHOD=codistill SEED=1 DATA=prepared OUT=runs bash recipes/RECIPE/train.sh
# It goes to OUT/NAME/seedSEED, one folder for each peer. A run that was stopped goes on from its last checkpoint, a
# finished one is left alone. DRY_RUN=1 prints the command and does nothing. README.md lists every variable.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
. "$root/recipes/training.sh"

read_settings() {
    RECIPE="${RECIPE:-translation}" SOURCE="${SOURCE:-}" TARGET="${TARGET:-}"
    PREPARED_BY="${PREPARED_BY:-data_prep/prepare.py}" EXPECT="${EXPECT:-}"
    METHOD="${METHOD:-codistill}" SEED="${SEED:-1}" PEERS="${PEERS:-2}" UPDATES="${UPDATES:-2000}"
    DISTANCE="${DISTANCE:-mse}" GAMMA="${GAMMA:-1.1}" INTERVAL="${INTERVAL:-2500}" SYNC="${SYNC:-0}" WAIT="${WAIT:-0}"
    BURN_IN="${BURN_IN:-0}"
    WIRE="${WIRE:-}"
    LABEL_SMOOTHING="${LABEL_SMOOTHING:-0.1}" RDROP_ALPHA="${RDROP_ALPHA:-5}"
    WORKERS="${WORKERS:-$PEERS}" TOKENS="${TOKENS:-4096}" UPDATE_FREQ="${UPDATE_FREQ:-}"
    LR="${LR:-5e-4}" WARMUP="${WARMUP:-4000}" WARMUP_INIT_LR="${WARMUP_INIT_LR:-}"
    DROPOUT="${DROPOUT:-0.3}" WEIGHT_DECAY="${WEIGHT_DECAY:-}" CLIP_NORM="${CLIP_NORM:-}"
    ARCH="${ARCH:-transformer}" LAYERS="${LAYERS:-}" WIDTH="${WIDTH:-}" FFN="${FFN:-}" HEADS="${HEADS:-}"
    VALIDATE="${VALIDATE:-500}" VALID_TOKENS="${VALID_TOKENS:-$TOKENS}" KEEP="${KEEP:-1}" LOG_EVERY="${LOG_EVERY:-$VALIDATE}"
    CPU="${CPU:-0}" GPUS="${GPUS:-}" GPUS_PER_PEER="${GPUS_PER_PEER:-auto}" PRECISION="${PRECISION:-fp32}"
    EVAL_BLEU="${EVAL_BLEU:-0}" BEAM="${BEAM:-5}" LENPEN="${LENPEN:-}" SUBWORDS="${SUBWORDS:-}" TOKENIZER="${TOKENIZER:-}"
    LOADERS="${LOADERS:-0}" DRY_RUN="${DRY_RUN:-0}" VOCAB="${VOCAB:-}" GPU_TOKENS_PER_SECOND="${GPU_TOKENS_PER_SECOND:-}"
    # Too much of mse ties untrained peers to each other, so its α starts low and grows. How they were tuned: Multi30k's README.
    if [[ "$DISTANCE" == *mse ]]; then
        ALPHA="${ALPHA:-0.1}" ALPHA_SCHEDULE="${ALPHA_SCHEDULE:-exponential}"
    else
        ALPHA="${ALPHA:-1.0}" ALPHA_SCHEDULE="${ALPHA_SCHEDULE:-constant}"
    fi
    read -ra launch <<<"${CODISTILL_LAUNCH:-codistill-launch}"
    read -ra fairseq_train <<<"${FAIRSEQ_TRAIN:-fairseq-train}"
    read -ra extra <<<"${EXTRA:-}"
}

check_settings() {
    local name
    [[ -n "$SOURCE" && -n "$TARGET" ]] ||
        refuse "SOURCE and TARGET must be languages; did you forget to start the train.sh of a recipe, not the shared one?"
    [[ -n "${DATA:-}" ]] || refuse "DATA must be a folder made by $PREPARED_BY, but is not set"
    [[ -n "${OUT:-}" ]] || refuse "OUT must be the folder for the runs, but is not set"
    # Between quotes a shell leaves ~ as it is.
    DATA="${DATA/#\~\//$HOME/}" OUT="${OUT/#\~\//$HOME/}"
    [[ "$SEED" =~ ^[0-9]+$ ]] || refuse "SEED must be a whole number, but is $SEED instead"
    for name in PEERS WORKERS TOKENS UPDATES VALIDATE KEEP; do count "$name"; done
    [[ -z "$GPUS" || "$GPUS" =~ ^[0-9]+$ ]] || refuse "GPUS must be a whole number, but is $GPUS instead"
    [[ -z "$UPDATE_FREQ" ]] || count UPDATE_FREQ
    [[ "$GPUS_PER_PEER" == auto ]] || count GPUS_PER_PEER
    [[ "$EVAL_BLEU" =~ ^[01]$ ]] || refuse "EVAL_BLEU must be 0 or 1, but is $EVAL_BLEU instead"
    [[ "$PRECISION" =~ ^fp(16|32)$ ]] || refuse "PRECISION must be fp16 or fp32, but is $PRECISION instead"
    ((WORKERS % PEERS == 0)) || refuse "WORKERS must be a multiple of PEERS=$PEERS, but is $WORKERS instead"
}

# Sets name, jobs (how many fairseq jobs), workers (of each job) and objective from METHOD.
choose_objective() {
    local smoothing=(--label-smoothing "$LABEL_SMOOTHING")
    local smoothed=(--criterion label_smoothed_cross_entropy "${smoothing[@]}")
    local rdrop=(--criterion label_smoothed_cross_entropy_with_rdrop "${smoothing[@]}" --rdrop-alpha "$RDROP_ALPHA")
    name="$METHOD" jobs=1 workers=$((WORKERS / PEERS))
    case "$METHOD" in
    codistill)
        name="codistill_$DISTANCE" jobs="$PEERS"
        objective=(--criterion codistill_ce --codistill-interval "$INTERVAL" --codistill-loss "$DISTANCE"
            --codistill-alpha "$ALPHA" --codistill-alpha-schedule "$ALPHA_SCHEDULE" --codistill-gamma "$GAMMA"
            --codistill-wait "$WAIT" --codistill-burn-in "$BURN_IN")
        [[ -z "$WIRE" ]] || objective+=(--codistill-wire-dtype "$WIRE")
        [[ "$SYNC" == 0 ]] || objective+=(--codistill-sync)
        ;;
    all_reduce) objective=("${smoothed[@]}") workers="$WORKERS" ;;
    all_reduce_no_smoothing) objective=(--criterion cross_entropy) workers="$WORKERS" ;;
    single) objective=(--criterion cross_entropy) ;;
    rdrop) objective=("${rdrop[@]}") ;;
    rdrop_all_reduce) objective=("${rdrop[@]}") workers="$WORKERS" ;;
    *) refuse "METHOD must be codistill, all_reduce, all_reduce_no_smoothing, single, rdrop or rdrop_all_reduce," \
        "but is $METHOD instead" ;;
    esac
    # checkpoint_best.pt must be the best by true NLL. Where labels are smoothed that is nll_loss (R-Drop logs twice the
    # true value, so the choice is the same); cross_entropy and, in validation, codistill_ce log it as loss.
    metric=nll_loss
    [[ "${objective[1]}" == label_smoothed* ]] || metric=loss
}

# of_data NAME DEFAULT: a text that DATA/manifest.json has, as evaluate.py reads it.
of_data() {
    local found
    found="$(sed -n 's/^.*"'"$1"'": *"\([^"]*\)".*$/\1/p' "$DATA/manifest.json" 2>/dev/null | head -n 1)" || true
    echo "${found:-$2}"
}

# Sets bleu and, with EVAL_BLEU=1, metric: each validation translates the validation set, and BLEU chooses checkpoint_best.pt,
# as in fairseq's own recipe for IWSLT'14. What is undone before scoring is what DATA was prepared with.
choose_bleu() {
    local subwords="${SUBWORDS:-$(of_data subwords sentencepiece)}" tokenizer="${TOKENIZER:-$(of_data tokenizer none)}"
    bleu=()
    [[ "$EVAL_BLEU" == 1 ]] || return 0
    count BEAM
    metric=bleu
    bleu=(--eval-bleu --eval-bleu-args "{\"beam\": $BEAM, ${LENPEN:+\"lenpen\": $LENPEN, }\"max_len_a\": 1.2, \"max_len_b\": 10}")
    case "$tokenizer" in
    moses) bleu+=(--eval-bleu-detok moses --eval-bleu-detok-args "{\"target_lang\": \"$TARGET\"}") ;;
    none) bleu+=(--eval-bleu-detok space) ;;
    *) refuse "TOKENIZER must be moses or none, but is $tokenizer instead" ;;
    esac
    case "$subwords" in
    bpe) bleu+=(--eval-bleu-remove-bpe) ;; # alone it means the "@@ " of subword-nmt
    sentencepiece) bleu+=(--eval-bleu-remove-bpe=sentencepiece) ;;
    *) refuse "SUBWORDS must be bpe or sentencepiece, but is $subwords instead" ;;
    esac
    bleu+=(--maximize-best-checkpoint-metric)
}

divisors() {
    local i found=()
    for ((i = 1; i <= $1; i++)); do (($1 % i)) || found+=("$i"); done
    sed 's/ /, /g' <<<"${found[*]}"
}

# Sets visible, gpus (of each job), update_freq and device_options of the launcher, which left to itself shares out all GPUs.
# A worker is one batch of TOKENS in an update. A GPU that stands for several sums their batches one after another: the
# same gradient as workers that all-reduce. So the batch does not depend on how many GPUs there are.
choose_devices() {
    visible="${GPUS:-$(visible_gpus)}"
    device_options=() gpus=1 precision=()
    if [[ "$CPU" != 0 ]]; then
        device_options=(--gpus-per-peer 0)
        extra+=(--cpu)
    else
        [[ "$PRECISION" == fp32 ]] || precision=(--fp16)
        ((visible > 0)) || [[ "$DRY_RUN" != 0 || "$PRECISION" == fp32 ]] || refuse "PRECISION=$PRECISION needs a GPU," \
            "but none is visible; CPU=1 trains on the processor, and GPUS=8 DRY_RUN=1 plans for eight"
        if [[ "$GPUS_PER_PEER" != auto ]]; then gpus="$GPUS_PER_PEER"; elif ((visible > jobs)); then gpus=$((visible / jobs)); fi
        ((workers % gpus == 0)) || refuse "GPUS_PER_PEER must divide the workers of each job, $workers: one of" \
            "$(divisors "$workers"), but is $gpus instead ($visible GPUs for $jobs job(s))"
        if ((jobs * gpus <= visible)); then
            device_options=(--gpus-per-peer "$gpus")
        elif ((gpus > 1)); then
            refuse "GPUS_PER_PEER=$gpus with $jobs job(s) needs $((jobs * gpus)) GPUs, but there are $visible"
        fi
    fi
    update_freq="${UPDATE_FREQ:-$((workers / gpus))}"
}

# Only what is set: an architecture has sizes of its own.
choose_model() {
    local part
    model=(--arch "$ARCH" --share-all-embeddings)
    for part in encoder decoder; do
        [[ -z "$LAYERS" ]] || model+=("--$part-layers" "$LAYERS")
        [[ -z "$WIDTH" ]] || model+=("--$part-embed-dim" "$WIDTH")
        [[ -z "$FFN" ]] || model+=("--$part-ffn-embed-dim" "$FFN")
        [[ -z "$HEADS" ]] || model+=("--$part-attention-heads" "$HEADS")
    done
    model+=(--dropout "$DROPOUT")
    optimizer=(--optimizer adam --adam-betas '(0.9, 0.98)')
    [[ -z "$WEIGHT_DECAY" ]] || optimizer+=(--weight-decay "$WEIGHT_DECAY")
    [[ -z "$CLIP_NORM" ]] || optimizer+=(--clip-norm "$CLIP_NORM")
    optimizer+=(--lr "$LR" --lr-scheduler inverse_sqrt --warmup-updates "$WARMUP")
    [[ -z "$WARMUP_INIT_LR" ]] || optimizer+=(--warmup-init-lr "$WARMUP_INIT_LR")
}

build_command() {
    # Validation and saving by updates alone, not at the ends of epochs too: all_reduce has twice as many of those, so its
    # best checkpoint would be picked from more candidates.
    local never=1000000
    # --required-batch-size-multiple 1: with its default, 8, fairseq's 2024 version drops a last batch of another size
    # without a word, in validation too (6 of 1,014 sentences of Multi30k).
    command=("${launch[@]}" --peers "$jobs" ${device_options[@]+"${device_options[@]}"} --
        "${fairseq_train[@]}" "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$run" --seed "$SEED"
        --task translation --source-lang "$SOURCE" --target-lang "$TARGET" "${model[@]}" "${objective[@]}"
        "${optimizer[@]}" ${precision[@]+"${precision[@]}"}
        --max-tokens "$TOKENS" --max-tokens-valid "$VALID_TOKENS" --required-batch-size-multiple 1
        --update-freq "$update_freq" --max-update "$UPDATES"
        --validate-interval-updates "$VALIDATE" --save-interval-updates "$VALIDATE" --keep-interval-updates "$KEEP"
        --validate-interval "$never" --save-interval "$never" --best-checkpoint-metric "$metric"
        ${bleu[@]+"${bleu[@]}"}
        --log-format json --log-interval "$LOG_EVERY" --num-workers "$LOADERS" ${extra[@]+"${extra[@]}"})
}

# What it will cost and what to expect, on stderr, so that DRY_RUN's stdout is the command alone.
tell() {
    local python="${PYTHON:-python3}" dictionary="$DATA/bin/dict.$TARGET.txt" words="$VOCAB" option
    local sizes=(--arch "$ARCH")
    command -v "$python" >/dev/null || return 0
    # fairseq adds four special symbols to the file's.
    [[ ! -f "$dictionary" ]] || words=$(($(wc -l <"$dictionary") + 4))
    for option in layers:"$LAYERS" width:"$WIDTH" ffn:"$FFN" vocab:"$words" tokens-per-second:"$GPU_TOKENS_PER_SECOND"; do
        [[ -z "${option#*:}" ]] || sizes+=("--${option%%:*}" "${option#*:}")
    done
    [[ "$CPU" == 0 ]] || sizes+=(--cpu)
    ((visible == 0)) || sizes+=(--devices "$visible")
    "$python" "$here/budget.py" --recipe "$RECIPE" --method "$METHOD" --jobs "$jobs" --gpus "$gpus" --update-freq "$update_freq" \
        --tokens "$TOKENS" --updates "$UPDATES" --keep "$KEEP" --expect "$EXPECT" "${sizes[@]}" >&2
}

# In a function, because bash reads a script while it runs it: an edit in the meantime would be executed by halves.
main() {
    read_settings
    check_settings
    choose_objective
    choose_bleu
    choose_devices
    choose_model
    run="$OUT/${NAME:-$name}/seed$SEED"
    build_command
    if [[ "$DRY_RUN" != 0 ]]; then
        tell
        typed "${command[@]}"
    else
        [[ -f "$DATA/bin/dict.$TARGET.txt" ]] || refuse "DATA must be a folder made by $PREPARED_BY, but $DATA is not"
        train_once "$run" "$jobs" checkpoint_best.pt "${command[@]}"
    fi
    exit
}
main
