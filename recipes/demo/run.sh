#!/usr/bin/env bash
# The demo: two peers that teach each other, against three baselines at equal updates and equal total batch.
# `make demo` runs it. Everything goes to DEMO_DIR (default: demo/). Safe to interrupt and to run again: what is finished
# is skipped, and training goes on from its last checkpoint. README.md lists the variables.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
baselines=(all_reduce all_reduce_no_smoothing single)

read_settings() {
    demo="${DEMO_DIR:-$root/demo}"
    mkdir -p "$demo/logs"
    demo="$(cd "$demo" && pwd)"
    pairs="${TRAIN_PAIRS:-6000}" test_pairs="${TEST_PAIRS:-500}"
    # Few sentences do not hold 2,000 different pieces.
    pieces="${PIECES:-$((pairs < 3000 ? 500 : 2000))}"
    export DATA="$demo/data" OUT="$demo/runs" SEED=1
    # As in recipe.toml, which has all the others.
    UPDATES="${UPDATES:-1000}" DISTANCE="${DISTANCE:-ce}"
    cores="$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)))')"
}

heading() { printf '\n== %s\n' "$*"; }

# side_by_side FUNCTION NAME…: FUNCTION NAME for every NAME at once. Models this small gain little from a second thread,
# so two jobs with a core each are done sooner than one after the other with two.
side_by_side() {
    local function="$1" name job jobs=() status=0
    shift
    # Job control gives each job a process group of its own, so that stop_jobs reaches all of its processes.
    set -m
    for name in "$@"; do
        ("$function" "$name") &
        jobs+=($!)
    done
    set +m
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    return "$status"
}

# The launchers take some seconds to stop their peers, and they are not our children: their groups are asked whether
# anybody is left. A second Ctrl-C does not wait.
stop_jobs() {
    local leader leaders
    trap - INT TERM EXIT
    leaders="$(jobs -p)"
    for leader in $leaders; do kill -TERM -- "-$leader" 2>/dev/null || true; done
    for leader in $leaders; do
        while kill -0 -- "-$leader" 2>/dev/null; do sleep 0.2; done
    done
}

# Shows the launcher's progress lines only, under the method's name.
train_baseline() {
    local log="$demo/logs/$1.log" threads=$((cores / ${#baselines[@]}))
    METHOD="$1" THREADS=$((threads > 0 ? threads : 1)) bash "$here/train.sh" 2>&1 </dev/null |
        tee "$log" | sed -un "s/^\([0-9:]* \)\?peer0:\? /\1$1: /p" ||
        { tail -n 20 "$log" >&2; echo "demo: the training of $1 failed; its whole log: $log" >&2; return 1; }
}

evaluate() {
    local run="$OUT/$1/seed1" ticker status=0
    echo "$1: translating $test_pairs test sentences with the best checkpoint of each peer, and of all together"
    # fairseq-generate says nothing that is for people: count what it has translated.
    while sleep 10 >/dev/null; do
        echo "$(date +%T) $1: $(find "$run" -name '*.generate.log' -exec cat {} + | grep -c '^H-') sentences translated"
    done &
    ticker=$!
    THREADS=1 bash "$here/evaluate.sh" "$run" || status=$?
    kill "$ticker"
    return "$status"
}

# All distances that were tried stand in the table.
report() {
    local run rows=()
    for run in "$OUT"/codistill_*; do rows+=("codistillation (${run##*codistill_})=$run"); done
    codistill-report "all_reduce, label smoothing=$OUT/all_reduce" "all_reduce=$OUT/all_reduce_no_smoothing" \
        "one peer alone=$OUT/single" "${rows[@]}" --title "demo: $pairs pairs, $UPDATES updates" --out "$demo/report"
}

closing() {
    cat <<END

Everything lies in $demo
  data/raw              the corpus; data/bin is what fairseq reads
  runs/METHOD/seed1     peer0, peer1: train.log, checkpoint_best.pt, test.hyp; command.txt: how it was trained
  report                table.md, results.json, curves.png: look at the validation curves
What to try next
  another distance      make demo DISTANCE=mse: one more row beside these, the baselines are not trained again
  real text             recipes/multi30k_en_de/README.md
  your own command      codistill-launch --peers 2 -- fairseq-train … --user-dir fairseq_codistill --criterion codistill_ce
END
}

main() {
    local started=$SECONDS
    command -v codistill-launch >/dev/null ||
        { echo "demo: codistill-launch must be on PATH, but is not. Did you forget 'make demo', or to activate .venv?" >&2; exit 2; }
    read_settings
    trap 'stop_jobs; exit 130' INT
    trap 'stop_jobs; exit 143' TERM
    trap stop_jobs EXIT

    heading "1/4 corpus and subword pieces"
    python "$here/prepare.py" --out "$DATA" --train-pairs "$pairs" --test-pairs "$test_pairs" --vocab "$pieces"
    heading "2/4 baselines, $UPDATES updates each, side by side"
    side_by_side train_baseline "${baselines[@]}"
    heading "3/4 codistillation, two peers, $UPDATES updates"
    METHOD=codistill bash "$here/train.sh"
    heading "4/4 translation and scores"
    side_by_side evaluate "${baselines[@]}" "codistill_$DISTANCE"
    heading "results after $(((SECONDS - started + 59) / 60)) minutes"
    report
    closing
    exit
}
main
