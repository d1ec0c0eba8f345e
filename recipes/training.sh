# What the train.sh of translation and of images share. Each reads it with `.`, and is named in its messages.

refuse() { echo "train.sh: $*" >&2; exit 2; }

# count NAME: the variable of that name must be a whole number of at least 1.
count() { [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || refuse "$1 must be a whole number of at least 1, but is ${!1} instead"; }

visible_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

# As it may be typed again. Without the blank that printf leaves at the end: what is read back from a file must be the same.
typed() {
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

# train_once RUN JOBS CHECKPOINT COMMAND…: run the command unless RUN is finished; it must leave RUN/peer{i}/CHECKPOINT for
# each of JOBS peers. A function `tell` of the caller is called before the training starts.
train_once() {
    local run="$1" jobs="$2" checkpoint="$3" line peer locked
    shift 3
    line="$(typed "$@")"
    mkdir -p "$run"
    # Held as long as the launcher lives, even if this script is killed.
    exec 9>"$run/lock"
    if command -v flock >/dev/null; then
        locked=0
        flock -n 9 2>/dev/null || locked=$?
        ((locked != 1)) || refuse "$run is being trained by another process"
        # Any other status: a file system without locks, such as Lustre mounted without -o flock.
        ((locked == 0)) || echo "train.sh: note: the file system of $run has no locks; nothing else may train it at the same time" >&2
    fi
    # Going on with other options would give a run that no command line describes.
    [[ ! -f "$run/command.txt" || "$(<"$run/command.txt")" == "$line" ]] ||
        refuse "$run was begun with another command (see its command.txt); give another NAME or OUT, or delete it"
    if [[ -f "$run/finished" ]]; then
        echo "$run: was finished, nothing done"
        return
    fi
    if declare -F tell >/dev/null; then tell; fi
    echo "$line" >"$run/command.txt"
    [[ -z "${THREADS:-}" ]] || export OMP_NUM_THREADS="$THREADS" MKL_NUM_THREADS="$THREADS"
    "$@"
    for ((peer = 0; peer < jobs; peer++)); do
        [[ -f "$run/peer$peer/$checkpoint" ]] || {
            echo "train.sh: the training ended, but $run/peer$peer has no $checkpoint" >&2
            return 1
        }
    done
    touch "$run/finished"
}
