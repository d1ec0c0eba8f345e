#!/usr/bin/env bash
# Train one run of image classification: METHOD=codistill SEED=1 DATA=prepared OUT=runs bash recipes/fashion_mnist/train.sh
# The recipes' own train.sh set what suits their data and call this. The run goes to OUT/NAME/seedSEED, one folder for each
# peer. A run that was stopped goes on from its last checkpoint, a finished one is left alone. DRY_RUN=1 prints the command
# and does nothing. Every variable is listed in recipes/images/README.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
. "$root/recipes/training.sh"

read_settings() {
    METHOD="${METHOD:-codistill}" SEED="${SEED:-1}" PEERS="${PEERS:-2}" REGULARISATION="${REGULARISATION:-unmodified}"
    EPOCHS="${EPOCHS:-90}" BATCH="${BATCH:-256}" LR="${LR:-0.1}" WEIGHT_DECAY="${WEIGHT_DECAY:-1e-4}" FRACTION="${FRACTION:-1}"
    WARMUP_LR="${WARMUP_LR:-$LR}" SCHEDULE="${SCHEDULE:-multistep}"
    DISTANCE="${DISTANCE:-mse}" ALPHA="${ALPHA:-1.0}" ALPHA_SCHEDULE="${ALPHA_SCHEDULE:-stepwise}"
    BURN_IN="${BURN_IN:-0}" INTERVAL="${INTERVAL:-2500}" SYNC="${SYNC:-1}" WAIT="${WAIT:-0}" WIRE="${WIRE:-fp32}"
    ARCH="${ARCH:-resnet50}" AUGMENTATION="${AUGMENTATION:-imagenet}" IMAGE_SIZE="${IMAGE_SIZE:-224}"
    VALIDATE="${VALIDATE:-5000}" WORKERS="${WORKERS:-4}"
    CPU="${CPU:-0}" GPUS_PER_PEER="${GPUS_PER_PEER:-1}" DRY_RUN="${DRY_RUN:-0}"
    read -ra launch <<<"${CODISTILL_LAUNCH:-codistill-launch}"
    read -ra fairseq_train <<<"${FAIRSEQ_TRAIN:-fairseq-train}"
    read -ra extra <<<"${EXTRA:-}"
    read -ra image_options <<<"${IMAGE_OPTIONS:-}"
}

check_settings() {
    [[ -n "${DATA:-}" ]] || refuse "DATA must be a folder with train/CLASS and valid/CLASS, but is not set"
    [[ -n "${OUT:-}" ]] || refuse "OUT must be the folder for the runs, but is not set"
    # Between quotes a shell leaves ~ as it is.
    DATA="${DATA/#\~\//$HOME/}" OUT="${OUT/#\~\//$HOME/}"
    [[ "$SEED" =~ ^[0-9]+$ ]] || refuse "SEED must be a whole number, but is $SEED instead"
    [[ "$FRACTION" =~ ^1(/[1-9][0-9]*)?$ ]] || refuse "FRACTION must be 1 or 1/k, but is $FRACTION instead"
    for name in PEERS BATCH GPUS_PER_PEER; do count "$name"; done
}

# decimal EXPRESSION: epochs with up to four places.
decimal() { awk "BEGIN { value = sprintf(\"%.4f\", $1); sub(/\\.?0+\$/, \"\", value); print value }"; }

# Sets name, jobs (how many fairseq jobs), update_freq, share (of the epochs of all_reduce) and objective from METHOD.
choose_objective() {
    # all_reduce means PEERS batches in every update. One worker sums them one after another: the same gradient, and the same
    # images behind each of BatchNorm's statistics, as PEERS workers that all-reduce.
    name="$METHOD" jobs=1 update_freq=1 share="$PEERS"
    objective=(--criterion cross_entropy)
    case "$METHOD" in
    codistill)
        jobs="$PEERS"
        objective=(--criterion codistill_ce --codistill-interval "$INTERVAL" --codistill-loss "$DISTANCE"
            --codistill-alpha "$ALPHA" --codistill-alpha-schedule "$ALPHA_SCHEDULE" --codistill-wait "$WAIT"
            --codistill-wire-dtype "$WIRE" --codistill-burn-in "$BURN_IN")
        [[ "$SYNC" == 0 ]] || objective+=(--codistill-sync)
        ;;
    all_reduce) update_freq="$PEERS" share=1 ;;
    single) ;;
    *) refuse "METHOD must be codistill, all_reduce or single, but is $METHOD instead" ;;
    esac
}

# Sets schedule. EPOCHS are those of all_reduce. A peer sees half the data in as many updates (a PEERS-th), so it trains half
# the epochs, with every milestone halved. 1/k of the data takes k times the epochs, again for as many updates.
choose_schedule() {
    local k="${FRACTION#1}" first second third lr="$LR"
    k="${k#/}" k="${k:-1}"
    # In proportion to the images in an update (Goyal et al. 2017): LR is a peer's.
    if [[ "$METHOD" == all_reduce ]]; then lr="$(awk "BEGIN { print $LR * $PEERS }")"; fi
    epochs="$(decimal "$EPOCHS * $k / $share")"
    [[ "$epochs" =~ ^[0-9]+$ ]] || refuse "EPOCHS=$EPOCHS must give whole epochs for $METHOD, but gives $epochs"
    # Of the 90 epochs of Goyal et al. 30, 60, 80; of the 45 of Sodhani et al. (§3.2) 18, 38, 44 instead of 15, 30, 40.
    if [[ "$REGULARISATION" == unmodified ]]; then
        first="$(decimal "$epochs / 3")" second="$(decimal "$epochs * 2 / 3")" third="$(decimal "$epochs * 8 / 9")"
    else
        first="$(decimal "$epochs * 18 / 45")" second="$(decimal "$epochs * 38 / 45")" third="$(decimal "$epochs * 44 / 45")"
    fi
    schedule=(--lr-scheduler "$SCHEDULE" --lr "$lr" --warmup-epochs "$(decimal "$epochs / 18")" --warmup-init-lr "$WARMUP_LR"
        --weight-decay "$WEIGHT_DECAY" --max-epoch "$epochs")
    case "$SCHEDULE" in
    multistep) schedule+=(--lr-milestones "$first,$second,$third") ;;
    cosine_he) ;;
    *) refuse "SCHEDULE must be multistep or cosine_he, but is $SCHEDULE instead" ;;
    esac
    case "$REGULARISATION" in
    unmodified | constant) ;;
    reduced)
        schedule+=(--weight-decays "$WEIGHT_DECAY,$(awk "BEGIN { print $WEIGHT_DECAY / 10 }"),0"
            --weight-decay-milestones "$first,$second")
        ;;
    *) refuse "REGULARISATION must be unmodified, reduced or constant, but is $REGULARISATION instead" ;;
    esac
    if [[ "$METHOD" == codistill && "$ALPHA_SCHEDULE" == stepwise ]]; then
        objective+=(--codistill-milestones "$first,$second,$third")
    fi
}

# Sets device_options of the launcher. Left to itself it shares out all GPUs, and a single job would get a larger batch.
choose_devices() {
    local gpus
    gpus="$(visible_gpus)"
    device_options=()
    if [[ "$CPU" != 0 ]]; then
        device_options=(--gpus-per-peer 0)
        extra+=(--cpu)
    elif ((jobs * GPUS_PER_PEER <= gpus)); then
        device_options=(--gpus-per-peer "$GPUS_PER_PEER")
    elif ((GPUS_PER_PEER > 1)); then
        refuse "GPUS_PER_PEER=$GPUS_PER_PEER with $jobs peers needs $((jobs * GPUS_PER_PEER)) GPUs, but there are $gpus"
    fi
    # BATCH is a peer's, whatever the number of its workers.
    [[ $((BATCH % GPUS_PER_PEER)) -eq 0 ]] || refuse "GPUS_PER_PEER=$GPUS_PER_PEER must divide BATCH=$BATCH"
}

build_command() {
    command=("${launch[@]}" --peers "$jobs" ${device_options[@]+"${device_options[@]}"} --
        "${fairseq_train[@]}" "$DATA" --user-dir "$root/fairseq_codistill" --save-dir "$run" --seed "$SEED"
        --task image_classification --arch "$ARCH" --augmentation "$AUGMENTATION" --image-size "$IMAGE_SIZE"
        --image-fraction "$FRACTION" --log-init-distance ${image_options[@]+"${image_options[@]}"} "${objective[@]}"
        --optimizer sgd_nesterov --momentum 0.9 --no-decay-norm-bias "${schedule[@]}"
        --batch-size "$((BATCH / GPUS_PER_PEER))" --update-freq "$update_freq"
        --validate-interval-updates "$VALIDATE" --save-interval-updates "$VALIDATE" --keep-interval-updates 1
        --validate-interval 1000000 --save-interval 1000000 --best-checkpoint-metric top1 --maximize-best-checkpoint-metric
        --log-format json --log-interval "$VALIDATE" --num-workers "$WORKERS" ${extra[@]+"${extra[@]}"})
}

# In a function, because bash reads a script while it runs it: an edit in the meantime would be executed by halves.
main() {
    read_settings
    check_settings
    choose_objective
    choose_schedule
    choose_devices
    run="$OUT/${NAME:-$name}/seed$SEED"
    build_command
    if [[ "$DRY_RUN" != 0 ]]; then
        typed "${command[@]}"
    else
        [[ -d "$DATA/train" ]] || refuse "DATA must be a folder with train/CLASS and valid/CLASS, but $DATA has no train"
        train_once "$run" "$jobs" checkpoint_last.pt "${command[@]}"
    fi
    exit
}
main
