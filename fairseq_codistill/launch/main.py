r"""`codistill-launch`: one fairseq job for each peer, started, shown and stopped together.

    codistill-launch --peers 2 -- \
        fairseq-train DATA --user-dir "$(codistill-launch --user-dir)" --criterion codistill_ce --save-dir RUN …

Peer i runs the same command with `--save-dir RUN/peer{i}`, `--seed S + i·10,000,000` and `--log-format json`, in a
process group of its own; it finds CODISTILL_PEER, CODISTILL_PEERS and CODISTILL_DIR in its environment and writes to
RUN/peer{i}/train.log. What else jobs would share each has for itself, too (`launch_outputs`).

`codistill-launch status RUN` shows who takes part; see `status`. `codistill-launch export RUN --out FILE.pt` writes the
run's model for fairseq-generate; see `export`. `codistill-launch --user-dir` prints the path of this
package, which every fairseq command needs as its --user-dir.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Optional

from ..common.output import tolerant_output
from ..common.paths import PLUGIN
from ..common.version import VersionAction
from . import export as launch_export
from . import preview as launch_preview
from . import status as launch_status
from .plan import Plan, make_plan
from .supervisor import Supervisor
from .view import LiveView, PlainView, print_summary


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see codistill-launch --help).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="codistill-launch",
        allow_abbrev=False,
        usage="codistill-launch --peers N [options] -- COMMAND ...\n       codistill-launch status DIR [options]\n"
        "       codistill-launch export RUN --out FILE.pt [options]\n"
        "       codistill-launch --user-dir\n       codistill-launch --version",
        description="Start one fairseq job for each peer, show them all, stop them together.",
        epilog="`codistill-launch status DIR` shows who takes part in a run, also one that others have started; "
        "`codistill-launch export RUN --out FILE.pt` writes its model for fairseq-generate. "
        "Any other command than fairseq-train or fairseq-hydra-train (a script, a Slurm step) only gets its "
        "environment; it finds its index in $CODISTILL_PEER. Ctrl-C stops all peers, a second one kills them; SIGUSR1 and "
        "SIGUSR2 go to peers that have a handler for them, else they stop all. "
        "Exit status: 0 when all peers ended well, 130, 143 … after Ctrl-C, SIGTERM …, 2 for bad input, "
        "else that of the first peer that failed.",
    )
    add = parser.add_argument
    add("--peers", type=int, required=True, metavar="N", help="how many jobs teach each other")
    add("--gpus-per-peer", type=int, metavar="K", help="GPUs for each peer, 0 for none (default: an equal share)")
    add("--max-restarts", type=int, default=0, metavar="R", help="how often a failed peer starts again (default: 0)")
    add("--log-dir", metavar="DIR", help="logs go to DIR/peer{i}/train.log (default: the command's --save-dir)")
    add("--grace", type=float, default=15.0, metavar="SECONDS", help="from the signal to stop to SIGKILL (default: 15)")
    add("--dry-run", action="store_true", help="only print the peers' commands, and what they cost, as comments")
    add("--user-dir", action="store_true", help="print the path that fairseq commands need as their --user-dir, and end")
    add("--version", action=VersionAction, help="print the version, and end")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The launcher's own options, and the command after the first `--`. Raises ValueError with one sentence."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(list(argv[:split]))
    if options.user_dir:
        raise ValueError("--user-dir stands alone, and prints a path; did you mean the command's own, which follows `--`?")
    # A `--` after the command has begun is the command's own: srun -- fairseq-train.
    options.command += list(argv[split if options.command else split + 1 :])
    if options.peers < 1:
        raise ValueError(f"--peers must be at least 1, but is {options.peers}.")
    for name in ("gpus_per_peer", "max_restarts", "grace"):
        if (getattr(options, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(options, name)}.")
    if not options.command:
        raise ValueError("a command must follow `--`, but there is none; did you forget it, or the `--`?")
    if shutil.which(options.command[0]) is None:
        raise ValueError(
            f"the command must be a program on PATH, but {options.command[0]!r} is not;"
            " did you forget to activate its environment?"
        )
    return options


def make_log(log: str, option: str) -> None:
    """Make a peer's log and its folders; raises ValueError, which names the option the path comes from."""
    try:
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "ab"):
            pass
    except OSError as error:
        raise ValueError(f"{option} must be writable, but {log!r} cannot be made: {error.strerror}.") from error


@tolerant_output()
def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command. Returns its exit status; bad input is one sentence on stderr and 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "status":
        return launch_status.main(argv[1:])
    if argv and argv[0] == "export":
        return launch_export.main(argv[1:])
    if list(argv) == ["--user-dir"]:
        print(PLUGIN)
        return 0
    try:
        options = parse_arguments(argv)
        plan = make_plan(options, os.environ)
        launch_preview.check(plan, os.environ)
        if options.dry_run:
            print(launch_preview.dry_run(plan, os.environ))
            return 0
        for peer in plan.peers:
            make_log(peer.log, "--log-dir" if options.log_dir else "--save-dir")
    except ValueError as error:
        print(f"codistill-launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return _run(plan)


def _run(plan: Plan) -> int:
    is_live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    supervisor = Supervisor(plan, LiveView(plan) if is_live else PlainView(plan))
    try:
        status = supervisor.run()
    except Exception:
        traceback.print_exc()
        print("codistill-launch: the fault above is its own; all peers were stopped with SIGTERM.", file=sys.stderr)
        return 1
    print_summary(plan, supervisor.peers)
    return status


if __name__ == "__main__":
    sys.exit(main())
