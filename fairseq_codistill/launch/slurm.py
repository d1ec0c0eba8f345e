r"""What recipes/slurm/peer.sbatch asks at each start of a peer: the same that `codistill-launch` tells its peers.

    python -m fairseq_codistill.launch.slurm PEER PEERS fairseq-train …

Mends a torn checkpoint and prints shell code: `export` of what the peer finds in its environment, `folder` and `command`.
Exit status: 0; 2 for bad input, in one sentence; 3 where a torn checkpoint cannot be replaced, and it must not start.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Optional

from . import checkpoint, outputs
from .command import FairseqCommand
from .plan import PeerPlan, peer_command, plan_peer, prepare, save_dir_of, start_notes


def plan(peer: int, peers: int, words: Sequence[str], environ: Mapping[str, str]) -> tuple[PeerPlan, list[str]]:
    """What one peer runs, and notes. Raises ValueError, in one sentence, where the command cannot be meant so."""
    # Whatever program stands there is taken for fairseq-train: its options must be made a peer's own.
    base, notes = prepare(FairseqCommand(words).as_training(), peers)
    command, own = peer_command(base, peer, peers, environ)
    if base.get("codistill-dir") is None and not environ.get("CODISTILL_DIR"):
        # Absolute, because all peers must mean one folder.
        own["CODISTILL_DIR"] = os.path.abspath(os.path.join(save_dir_of(base), "exchange"))
    planned = plan_peer(peer, command, own, save_dir_of(base))
    return planned, notes + start_notes(base, [planned]) + outputs.notes(base, environ, peers)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command. Returns its exit status."""
    peer, peers, *words = sys.argv[1:] if argv is None else argv
    try:
        planned, notes = plan(int(peer), int(peers), words, os.environ)
    except ValueError as error:
        print(f"peer.sbatch: {error}", file=sys.stderr)
        return 2
    assert planned.save_dir is not None, "fairseq has a default for it"
    try:
        notes.append(checkpoint.mend(planned.save_dir) or "")
    except ValueError as error:
        print(f"peer.sbatch: {error}", file=sys.stderr)
        return checkpoint.REFUSED
    for note in filter(None, notes):
        print(f"peer.sbatch: note: {note}", file=sys.stderr)
    for name, value in planned.environ.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"folder={shlex.quote(planned.save_dir)}\ncommand=({shlex.join(planned.command)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
