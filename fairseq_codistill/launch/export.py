r"""`codistill-launch export RUN --out FILE.pt`: the model of a finished run, for `fairseq-generate --path FILE.pt`.

It is the best checkpoint of the best peer, by the metric that chose the checkpoints; `--peer` names another peer,
`--average N` takes the mean of that peer's last N checkpoints instead. The file holds weights and configuration, not the
optimizer's state (a third of the size with Adam), and fairseq loads it without --user-dir.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..common.output import tolerant_output
from ..common.paths import expanded, printable
from .view import size

BEST, LAST = "checkpoint_best.pt", "checkpoint_last.pt"
_BY_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")  # --save-interval-updates
_BY_EPOCH = re.compile(r"checkpoint(\d+)\.pt")


class Peer(NamedTuple):
    """A peer's folder, and how good it says it is."""

    folder: Path
    standing: Any  # checkpoints.Standing


def last_checkpoints(
    folder: Path, count: int, option: str = "--average", forgot: str = "--keep-interval-updates"
) -> list[Path]:
    """The `count` newest checkpoints of a peer, oldest first: `checkpoint_EPOCH_UPDATE.pt`, or where there are none of these,
    `checkpointEPOCH.pt`. checkpoint_best.pt and checkpoint_last.pt are copies, and do not count.

    Raises ValueError if there are fewer: an average of another number of models is another result.
    """
    found = _numbered(folder, _BY_UPDATE) or _numbered(folder, _BY_EPOCH)
    if len(found) < count:
        raise ValueError(
            f"{option} must be at most {len(found)}, the checkpoint_EPOCH_UPDATE.pt or checkpointEPOCH.pt that {folder} has, "
            f"but is {count}; did you forget to train with as large a {forgot}?"
        )
    return [found[number] for number in sorted(found)[-count:]]


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    matches = {path: name.fullmatch(path.name) for path in folder.glob("checkpoint*.pt")}
    return {int(match[1]): path for path, match in matches.items() if match}


def peer_folders(run: Path) -> list[Path]:
    """RUN/peer0, RUN/peer1, …; RUN itself where it is the --save-dir of one training. Raises ValueError."""
    if not run.is_dir():
        raise ValueError(f"RUN must be the --save-dir of a run, but {run} is no folder.")
    peers = [path for path in run.glob("peer*") if re.fullmatch(r"peer\d+", path.name) and path.is_dir()]
    folders = sorted(peers, key=lambda path: int(path.name[4:])) or [run]
    if not any(list(folder.glob("checkpoint*.pt")) for folder in folders):
        where = f"its {', '.join(folder.name for folder in folders)} have" if peers else "it has"
        raise ValueError(
            f"RUN must have checkpoints, in peer0, peer1, … or in itself, but {where} no checkpoint*.pt: {run}; "
            "did you forget a folder between, such as seed1, or train with --no-save?"
        )
    return folders


def chosen_peer(run: Path, number: Optional[int]) -> Peer:
    """Peer `number`, or the best by the metric that chose its checkpoints. Raises ValueError.

    A peer that cannot be read is told on stderr, and never the best.
    """
    folders = peer_folders(run)
    if number is not None:
        names = [folder.name for folder in folders if folder != run]
        if f"peer{number}" not in names:
            told = f"the run has {', '.join(names)}" if names else f"{run} is the folder of one training"
            raise ValueError(f"--peer must be a peer of the run, but is {number}, and {told}.")
        return _read(run / f"peer{number}")
    peers = []
    for folder in folders:
        try:
            peers.append(_read(folder))
        except ValueError as error:
            if len(folders) == 1:
                raise
            print(f"codistill-launch export: WARNING: not considered: {printable(str(error))}", file=sys.stderr)
    if not peers:
        raise ValueError(f"RUN must have a checkpoint that can be read, but none of the peers of {run} has.")
    metrics = {(peer.standing.metric, peer.standing.maximise) for peer in peers}
    if len(metrics) > 1:
        raise ValueError(
            f"--peer must be given where peers chose their checkpoints by different metrics, as in {run}: "
            f"{', '.join(sorted(metric for metric, _ in metrics))}."
        )
    return min(peers, key=lambda peer: peer.standing.rank)  # of equal ones the first


def _read(folder: Path) -> Peer:
    from ..checkpoints import standing

    for name in (BEST, LAST):
        if (folder / name).is_file():
            return Peer(folder, standing(_load(folder / name)))
    raise ValueError(f"{folder} must have a {BEST} or a {LAST}, but has neither.")


def _load(path: Path) -> Any:
    from ..checkpoints import load

    try:
        return load(path)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path} must be a whole checkpoint of fairseq, but cannot be read ({reason}).") from error


def export(run: Path, out: Path, peer: Optional[int] = None, average: Optional[int] = None, last: bool = False,
           force: bool = False) -> str:  # fmt: skip
    """Write the model of a run to `out`, whole or not at all; what was done, in one sentence.

    `average`: the mean over so many checkpoints instead of the best one; `last`: the newest instead of the best.
    Raises ValueError, in one sentence.
    """
    from .. import checkpoints

    _check_out(out, force)
    chosen = chosen_peer(run, peer)
    sources = last_checkpoints(chosen.folder, average) if average else [chosen.folder / (LAST if last else BEST)]
    if not sources[0].is_file():
        raise ValueError(f"{sources[0]} is not there: the run has not been validated; did you mean --checkpoint last?")
    if any(out.exists() and os.path.samefile(out, path) for path in [*run.glob("checkpoint*.pt"), *run.glob("peer*/*.pt")]):
        raise ValueError(f"--out must be no checkpoint of the run itself, which training goes on from, but is {out}.")
    for source in sources:
        _load(source)  # a torn one is told by its name
    state = checkpoints.average(sources, widen=True) if average else _load(sources[0])
    state = {**checkpoints.for_generation(state), "exported_from": [str(source.name) for source in sources]}
    reasons = _write(state, out, force)
    told = f"{out}: {_source(run, chosen, sources, state)}, {size(out.stat().st_size)}"
    return told + (f"; fairseq needs --user-dir for it, since {' and '.join(reasons)}" if reasons else "")


def _source(run: Path, chosen: Peer, sources: Sequence[Path], state: Any) -> str:
    standing, update = chosen.standing, state["optimizer_history"][-1]["num_updates"]
    of = f" of {chosen.folder.name}" if chosen.folder != run else ""
    best = "" if standing.best is None else f" (best {standing.metric} {standing.best:g})"
    what = sources[0].name if len(sources) == 1 else f"mean of {sources[0].name} to {sources[-1].name}"
    return f"{what}{of}{best}, update {update}"


def _check_out(out: Path, force: bool) -> None:
    if out.is_dir():
        raise ValueError(f"--out must be a file, such as {out / 'model.pt'}, but {out} is a folder.")
    if out.exists() and not force:
        raise ValueError(f"--out must be a file that does not exist, but {out} does; give --force to replace it.")


def _write(state: Any, out: Path, force: bool) -> list[str]:
    """Beside its place, then renamed. Returns why fairseq needs the plugin to load it; raises ValueError."""
    import torch

    from ..checkpoints import needs_plugin

    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        reasons = needs_plugin(part, state)
        if force:
            os.replace(part, out)
        else:
            _rename_to_new(part, out)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise ValueError(f"--out must be a file that can be written, but {out} is not: {reason}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return reasons


def _rename_to_new(part: Path, out: Path) -> None:
    """Raises FileExistsError if another process has made `out` meanwhile."""
    try:
        os.link(part, out)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if out.exists():
            raise FileExistsError(17, "File exists", str(out)) from None
        os.replace(part, out)


# The command.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see codistill-launch export --help).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="codistill-launch export",
        allow_abbrev=False,
        description="Write the model of a run, without the optimizer's state, for fairseq-generate --path FILE.pt.",
        epilog="Without --peer: the peer whose checkpoint_best.pt is the best by --best-checkpoint-metric. Exit status: 0; "
        "2 for bad input.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run's --save-dir, with peer0, peer1, …; or the --save-dir of one training")
    add("--out", required=True, metavar="FILE.pt", help="the file to write; its folder is made")
    add("--peer", type=int, metavar="N", help="this peer instead of the best")
    add("--average", type=int, metavar="N", help="the mean of the peer's last N checkpoints, by updates "
        "(--keep-interval-updates), else by epochs")  # fmt: skip
    add("--checkpoint", choices=("best", "last"), default="best", help="which checkpoint of the peer (default: best)")
    add("--force", action="store_true", help="replace FILE.pt if it exists")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises ValueError with one sentence."""
    options = _parser().parse_args(list(argv))
    if options.average is not None and options.average < 1:
        raise ValueError(f"--average must be at least 1, but is {options.average}.")
    if options.average and options.checkpoint == "last":
        raise ValueError("--checkpoint last must not be given with --average, which always takes the newest checkpoints.")
    return options


@tolerant_output()
def main(argv: Sequence[str]) -> int:
    """The command, without its first word. Returns its exit status; bad input is one sentence on stderr and 2."""
    try:
        options = parse_arguments(argv)
        run, out = (Path(os.path.abspath(expanded(path))) for path in (options.run, options.out))
        told = export(run, out, options.peer, options.average, options.checkpoint == "last", options.force)
        print(printable(told))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"codistill-launch export: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0
