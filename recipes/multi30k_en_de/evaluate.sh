#!/usr/bin/env bash
# Translate and score finished runs: DATA=prepared bash evaluate.sh RUN…, each RUN a folder that train.sh filled.
# Writes RUN/peer{i}/SET.sacrebleu.json and SET.nll.json for each peer's checkpoint_best.pt and, where there are several
# peers, RUN/ensemble.SET.… for all of them together. A result that is newer than its checkpoints is left alone.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
refuse() { echo "evaluate.sh: $*" >&2; exit 2; }
fail() { echo "evaluate.sh: $*" >&2; exit 1; }

# up_to_date RESULT CHECKPOINTS: the checkpoints are joined with ":".
up_to_date() {
    local checkpoint checkpoints
    IFS=: read -ra checkpoints <<<"$2"
    for checkpoint in "${checkpoints[@]}"; do
        [[ -s "$1" && "$1" -nt "$checkpoint" ]] || return 1
    done
}

# generate CHECKPOINTS SUBSET LOG OPTIONS…: what fairseq-generate prints goes to LOG.
generate() {
    local checkpoints="$1" subset="$2" log="$3"
    shift 3
    # With its default --required-batch-size-multiple, 8, fairseq's 2024 version drops the last sentences of a set.
    "${fairseq_generate[@]}" "$DATA/bin" --user-dir "$root/fairseq_codistill" --task translation \
        --source-lang en --target-lang de --path "$checkpoints" --gen-subset "$subset" \
        --batch-size "$BATCH_SENTENCES" --required-batch-size-multiple 1 --num-workers 0 \
        ${cpu[@]+"${cpu[@]}"} "$@" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        fail "fairseq-generate failed, see $log"
    }
}

# check_lines FOUND SET WHAT: every sentence of the set must be there, once.
check_lines() {
    local expected
    expected=$(wc -l <"$DATA/raw/$2.de")
    [[ "$1" -eq "$expected" ]] || fail "$3 must have the $expected sentences of $DATA/raw/$2.de, but has $1"
}

# bleu CHECKPOINTS SET SUBSET PREFIX: against the raw reference, so that the score does not depend on the pieces.
bleu() {
    local set="$2" at="$4$2"
    if up_to_date "$at.sacrebleu.json" "$1"; then return; fi
    generate "$1" "$3" "$at.generate.log" --beam "$BEAM" --remove-bpe sentencepiece
    # fairseq translates the longest sentences first: put them back into the order of the text.
    grep -a '^H-' "$at.generate.log" | cut -c3- | LC_ALL=C sort -n -k1,1 | cut -f3- >"$at.hyp"
    check_lines "$(wc -l <"$at.hyp")" "$set" "$at.hyp"
    "${sacrebleu[@]}" "$DATA/raw/$set.de" -i "$at.hyp" -m bleu -w 4 --format json >"$at.part"
    mv "$at.part" "$at.sacrebleu.json"
}

# nll CHECKPOINTS SET SUBSET PREFIX: the true one, whatever the run was trained with: bits per target piece and end of
# sentence, no smoothing, each sentence once. fairseq prints the base-2 log-probabilities of each reference after P-.
nll() {
    local set="$2" at="$4$2"
    if up_to_date "$at.nll.json" "$1"; then return; fi
    generate "$1" "$3" "$at.score.log" --score-reference
    check_lines "$(grep -ac '^P-' "$at.score.log")" "$set" "$at.score.log"
    LC_ALL=C awk -F'\t' '
        /^P-/ { n = split($2, piece, " "); for (i = 1; i <= n; i++) bits -= piece[i]; tokens += n }
        END { printf "{\"name\": \"NLL\", \"score\": %.5f, \"base\": 2, \"tokens\": %d}\n", bits / tokens, tokens }
    ' "$at.score.log" >"$at.part"
    mv "$at.part" "$at.nll.json"
}

# score CHECKPOINTS PREFIX
score() {
    local set
    for set in $TEST_SETS; do bleu "$1" "${set%%:*}" "${set##*:}" "$2"; done
    for set in $NLL_SETS; do nll "$1" "${set%%:*}" "${set##*:}" "$2"; done
}

score_run() {
    local run="${1%/}" checkpoint checkpoints
    shopt -s nullglob
    checkpoints=("$run"/peer*/checkpoint_best.pt)
    shopt -u nullglob
    ((${#checkpoints[@]})) || refuse "$run must be a run of train.sh, but has no peer*/checkpoint_best.pt"
    for checkpoint in "${checkpoints[@]}"; do
        score "$checkpoint" "$(dirname "$checkpoint")/"
    done
    if ((${#checkpoints[@]} > 1)); then
        score "$(IFS=:; echo "${checkpoints[*]}")" "$run/ensemble."
    fi
    echo "$run: scored"
}

main() {
    local run
    # NAME:SUBSET, the text in DATA/raw and what fairseq-preprocess called it.
    TEST_SETS="${TEST_SETS-test_2016_flickr:test test_2017_flickr:test1 test_2017_mscoco:test2}"
    NLL_SETS="${NLL_SETS-val:valid test_2016_flickr:test}"
    BEAM="${BEAM:-5}" BATCH_SENTENCES="${BATCH_SENTENCES:-64}"
    read -ra fairseq_generate <<<"${FAIRSEQ_GENERATE:-fairseq-generate}"
    read -ra sacrebleu <<<"${SACREBLEU:-sacrebleu}"
    cpu=()
    [[ "${CPU:-0}" == 0 ]] || cpu=(--cpu)
    [[ -f "${DATA:-}/bin/dict.de.txt" ]] ||
        refuse "DATA must be a folder made by data_prep/multi30k.py, but is ${DATA:-not set}"
    (($#)) || refuse "give the folders of the runs, for example runs/single/seed1"
    [[ -z "${THREADS:-}" ]] || export OMP_NUM_THREADS="$THREADS" MKL_NUM_THREADS="$THREADS"
    for run in "$@"; do score_run "$run"; done
    exit
}
main "$@"
