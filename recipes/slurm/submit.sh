#!/usr/bin/env bash
# Start a codistillation run under Slurm, with the command line of codistill-launch:
#
#   recipes/slurm/submit.sh --peers 2 --gpus-per-peer 8 [--gpus-per-node 8] [options of sbatch] -- \
#       fairseq-train DATA --user-dir fairseq_codistill --criterion codistill_ce --save-dir RUN …
#
# It submits peer.sbatch as an array job, one task for each peer, and prints the job's number. RUN must be on a file system
# that all nodes see. What must go to sbatch (--partition, --time, --account, --wait …) is passed on as it is.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
refuse() { echo "submit.sh: $*" >&2; exit 2; }

is_count() { [[ "$1" =~ ^[1-9][0-9]*$ ]]; }

# Sets peers, gpus_per_peer, gpus_per_node, sbatch_options and command.
read_arguments() {
    peers="" gpus_per_peer="" gpus_per_node="" sbatch_options=()
    while (($#)) && [[ "$1" != -- ]]; do
        case "$1" in
        --peers | --gpus-per-peer | --gpus-per-node)
            (($# > 1)) || refuse "$1 must have a value, but none follows it"
            local name="${1#--}"
            printf -v "${name//-/_}" '%s' "$2"
            shift 2
            ;;
        --peers=* | --gpus-per-peer=* | --gpus-per-node=*)
            local word="${1#--}"
            local name="${word%%=*}"
            printf -v "${name//-/_}" '%s' "${word#*=}"
            shift
            ;;
        *) sbatch_options+=("$1"); shift ;;
        esac
    done
    (($# > 1)) || refuse "a fairseq-train command must follow --, but there is none; did you forget it, or the --?"
    shift
    command=("$@")
}

# Nodes and tasks of a peer: one task for each GPU.
choose_nodes() {
    is_count "$peers" || refuse "--peers must be a whole number of at least 1, but is ${peers:-not given}"
    [[ "$gpus_per_peer" =~ ^[0-9]*$ ]] || refuse "--gpus-per-peer must be a whole number, but is $gpus_per_peer instead"
    [[ -z "$gpus_per_node" ]] || is_count "$gpus_per_node" ||
        refuse "--gpus-per-node must be a whole number of at least 1, but is $gpus_per_node instead"
    ((${gpus_per_peer:-1})) || return 0 # without GPUs: what --ntasks, --nodes, --cpus-per-task say
    gpus_per_peer="${gpus_per_peer:-1}"
    local per_node="${gpus_per_node:-$gpus_per_peer}"
    ((per_node < gpus_per_peer)) || per_node="$gpus_per_peer"
    ((gpus_per_peer % per_node == 0)) || refuse "--gpus-per-peer must be a multiple of --gpus-per-node $per_node," \
        "but is $gpus_per_peer instead"
    sbatch_options+=(--nodes=$((gpus_per_peer / per_node)) --ntasks-per-node="$per_node" --gpus-per-node="$per_node")
}

main() {
    read_arguments "$@"
    choose_nodes
    command -v sbatch >/dev/null || refuse "sbatch must be on PATH, but is not; is this a Slurm cluster's login node?"
    exec sbatch --parsable --array=0-$((peers - 1)) --export=ALL,CODISTILL_PEERS="$peers" \
        ${sbatch_options[@]+"${sbatch_options[@]}"} "$here/peer.sbatch" "${command[@]}"
}
main "$@"
