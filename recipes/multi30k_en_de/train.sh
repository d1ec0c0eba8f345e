#!/usr/bin/env bash
# Train one run of the comparison: METHOD=codistill SEED=1 DATA=prepared OUT=runs bash train.sh
# It goes to OUT/NAME/seedSEED, one folder for each peer. A run that was stopped goes on from its last checkpoint, a
# finished one is left alone. DRY_RUN=1 prints the command and does nothing. Every variable is listed in README.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
refuse() { echo "train.sh: $*" >&2; exit 2; }

read_settings() {
    METHOD="${METHOD:-codistill}" SEED="${SEED:-1}" PEERS="${PEERS:-2}" UPDATES="${UPDATES:-2000}"
    DISTANCE="${DISTANCE:-mse}" GAMMA="${GAMMA:-1.1}" INTERVAL="${INTERVAL:-50}" SYNC="${SYNC:-1}" WAIT="${WAIT:-0}"
    WIRE="${WIRE:-fp32}"
    LABEL_SMOOTHING="${LABEL_SMOOTHING:-0.1}" RDROP_ALPHA="${RDROP_ALPHA:-5}"
    TOKENS="${TOKENS:-1000}" LR="${LR:-3e-3}" WARMUP="${WARMUP:-200}" DROPOUT="${DROPOUT:-0.1}"
    LAYERS="${LAYERS:-2}" WIDTH="${WIDTH:-128}" FFN="${FFN:-256}" HEADS="${HEADS:-4}"
    VALIDATE="${VALIDATE:-100}" VALID_TOKENS="${VALID_TOKENS:-4000}"
    CPU="${CPU:-0}" GPUS_PER_PEER="${GPUS_PER_PEER:-1}" DRY_RUN="${DRY_RUN:-0}"
    # Too much of mse ties untrained peers to each other, so its α starts low and grows. How they were tuned: README.md.
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
    [[ -n "${DATA:-}" ]] || refuse "DATA must be a folder made by data_prep/multi30k.py, but is not set"
    [[ -n "${OUT:-}" ]] || refuse "OUT must be the folder for the runs, but is not set"
    [[ "$SEED" =~ ^[0-9]+$ ]] || refuse "SEED must be a whole number, but is $SEED instead"
    [[ "$PEERS" =~ ^[1-9][0-9]*$ ]] || refuse "PEERS must be a whole number of at least 1, but is $PEERS instead"
    [[ "$GPUS_PER_PEER" =~ ^[1-9][0-9]*$ && $((PEERS % GPUS_PER_PEER)) -eq 0 ]] ||
        refuse "GPUS_PER_PEER must be a whole number that divides PEERS=$PEERS, but is $GPUS_PER_PEER instead"
}

# Sets name, jobs (how many fairseq jobs), update_freq and objective from METHOD.
choose_objective() {
    # all_reduce means PEERS batches in every update. One worker sums them one after another: the same gradient as PEERS
    # workers that all-reduce. With GPUS_PER_PEER=2 fairseq itself makes two workers and all-reduces.
    local together=$((PEERS / GPUS_PER_PEER))
    local smoothing=(--label-smoothing "$LABEL_SMOOTHING")
    local smoothed=(--criterion label_smoothed_cross_entropy "${smoothing[@]}")
    local rdrop=(--criterion label_smoothed_cross_entropy_with_rdrop "${smoothing[@]}" --rdrop-alpha "$RDROP_ALPHA")
    name="$METHOD" jobs=1 update_freq=1
    case "$METHOD" in
    codistill)
        name="codistill_$DISTANCE" jobs="$PEERS"
        objective=(--criterion codistill_ce --codistill-interval "$INTERVAL" --codistill-loss "$DISTANCE"
            --codistill-alpha "$ALPHA" --codistill-alpha-schedule "$ALPHA_SCHEDULE" --codistill-gamma "$GAMMA"
            --codistill-wait "$WAIT" --codistill-wire-dtype "$WIRE")
        [[ "$SYNC" == 0 ]] || objective+=(--codistill-sync)
        ;;
    all_reduce) objective=("${smoothed[@]}") update_freq="$together" ;;
    all_reduce_no_smoothing) objective=(--criterion cross_entropy) update_freq="$together" ;;
    single) objective=(--criterion cross_entropy) ;;
    rdrop) objective=("${rdrop[@]}") ;;
    rdrop_all_reduce) objective=("${rdrop[@]}") update_freq="$together" ;;
    *) refuse "METHOD must be codistill, all_reduce, all_reduce_no_smoothing, single, rdrop or rdrop_all_reduce," \
        "but is $METHOD instead" ;;
    esac
    # checkpoint_best.pt must be the best by true NLL. Where labels are smoothed that is nll_loss (R-Drop logs twice the
    # true value, so the choice is the same); cross_entropy and, in validation, codistill_ce log it as loss.
    metric=nll_loss
    [[ "${objective[1]}" == label_smoothed* ]] || metric=loss
}

count_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

# Sets device_options of the launcher. Left to itself it shares out all GPUs, and a single job would get a larger batch.
choose_devices() {
    local gpus
    gpus="$(count_gpus)"
    device_options=()
    if [[ "$CPU" != 0 ]]; then
        device_options=(--gpus-per-peer 0)
        extra+=(--cpu)
    elif ((jobs * GPUS_PER_PEER <= gpus)); then
        device_options=(--gpus-per-peer "$GPUS_PER_PEER")
    elif ((GPUS_PER_PEER > 1)); then
        refuse "GPUS_PER_PEER=$GPUS_PER_PEER with $jobs peers needs $((jobs * GPUS_PER_PEER)) GPUs, but there are $gpus"
    fi
}

build_command() {
    # Validation and saving by updates alone, not at the ends of epochs too: all_reduce has twice as many of those, so its
    # best checkpoint would be picked from more candidates.
    local never=1000000
    # --required-batch-size-multiple 1: with its default, 8, fairseq's 2024 version drops a last batch of another size
    # without a word, in validation too (6 of 1,014 sentences here).
    command=("${launch[@]}" --peers "$jobs" ${device_options[@]+"${device_options[@]}"} --
        "${fairseq_train[@]}" "$DATA/bin" --user-dir "$root/fairseq_codistill" --save-dir "$run" --seed "$SEED"
        --task translation --source-lang en --target-lang de --arch transformer --share-all-embeddings
        --encoder-layers "$LAYERS" --encoder-embed-dim "$WIDTH" --encoder-ffn-embed-dim "$FFN"
        --encoder-attention-heads "$HEADS" --decoder-layers "$LAYERS" --decoder-embed-dim "$WIDTH"
        --decoder-ffn-embed-dim "$FFN" --decoder-attention-heads "$HEADS" --dropout "$DROPOUT" "${objective[@]}"
        --optimizer adam --adam-betas '(0.9, 0.98)' --lr "$LR" --lr-scheduler inverse_sqrt --warmup-updates "$WARMUP"
        --max-tokens "$TOKENS" --max-tokens-valid "$VALID_TOKENS" --required-batch-size-multiple 1
        --update-freq "${UPDATE_FREQ:-$update_freq}" --max-update "$UPDATES"
        --validate-interval-updates "$VALIDATE" --save-interval-updates "$VALIDATE" --keep-interval-updates 1
        --validate-interval "$never" --save-interval "$never" --best-checkpoint-metric "$metric"
        --log-format json --log-interval "$VALIDATE" --num-workers 0 ${extra[@]+"${extra[@]}"})
}

start() {
    local typed="$1" peer
    [[ -f "$DATA/bin/dict.de.txt" ]] || refuse "DATA must be a folder made by data_prep/multi30k.py, but $DATA is not"
    mkdir -p "$run"
    # Held as long as the launcher lives, even if this script is killed.
    exec 9>"$run/lock"
    if command -v flock >/dev/null && ! flock -n 9; then refuse "$run is being trained by another process"; fi
    # Going on with other options would give a run that no command line describes.
    [[ ! -f "$run/command.txt" || "$(<"$run/command.txt")" == "$typed" ]] ||
        refuse "$run was begun with another command (see its command.txt); give another NAME or OUT, or delete it"
    if [[ -f "$run/finished" ]]; then
        echo "$run: was finished, nothing done"
        return
    fi
    echo "$typed" >"$run/command.txt"
    [[ -z "${THREADS:-}" ]] || export OMP_NUM_THREADS="$THREADS" MKL_NUM_THREADS="$THREADS"
    "${command[@]}"
    for ((peer = 0; peer < jobs; peer++)); do
        [[ -f "$run/peer$peer/checkpoint_best.pt" ]] || {
            echo "train.sh: the training ended, but $run/peer$peer has no checkpoint_best.pt" >&2
            return 1
        }
    done
    touch "$run/finished"
}

# In a function, because bash reads a script while it runs it: an edit in the meantime would be executed by halves.
main() {
    local typed
    read_settings
    check_settings
    choose_objective
    choose_devices
    run="$OUT/${NAME:-$name}/seed$SEED"
    build_command
    # Without the blank that printf leaves at the end: what is read back from command.txt must be the same.
    printf -v typed '%q ' "${command[@]}"
    if [[ "$DRY_RUN" != 0 ]]; then
        echo "${typed% }"
    else
        start "${typed% }"
    fi
    exit
}
main
