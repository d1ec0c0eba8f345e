r"""`codistill-launch`: one fairseq job for each peer, started, shown and stopped together.

    codistill-launch --peers 2 -- \
        fairseq-train DATA --user-dir fairseq_codistill --criterion codistill_ce --save-dir RUN …

Peer i runs the same command with `--save-dir RUN/peer{i}`, `--seed S + i·10,000,000` and `--log-format json`, in a
process group of its own; it finds CODISTILL_PEER, CODISTILL_PEERS and CODISTILL_DIR in its environment and writes to
RUN/peer{i}/train.log. Four parts: what each peer runs (`make_plan`), reading its log (`LogFollower`), keeping it going
(`Peer`, `Supervisor`), and the view.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import logging
import os
import re
import select
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Optional

SEED_STEP = 10_000_000  # fairseq seeds update u with seed + u: peers this far apart never draw the same numbers
TAIL_LINES = 20
POLL_SECONDS = 0.25
PLAIN_SECONDS = 10.0  # without a terminal, a peer reports at most this often between validations

# ---------------------------------------------------------------------------------------------- what each peer runs


@dataclass
class PeerPlan:
    """What one peer runs: its command, what is added to its environment, and its log."""

    index: int
    command: list[str]
    environ: dict[str, str]
    log: str


@dataclass
class Plan:
    """Everything decided before the first process starts."""

    run_dir: str
    peers: list[PeerPlan]
    max_restarts: int
    grace_seconds: float
    notes: list[str] = field(default_factory=list)


class FairseqCommand:
    """A `fairseq-train` (options) or `fairseq-hydra-train` (overrides) command; nice or srun may stand before it."""

    PROGRAM = re.compile(r"(?:^|/)fairseq(?:-(?P<a>hydra-)?train|_cli[./](?P<b>hydra_)?train(?:\.py)?)$")
    OVERRIDE = re.compile(r"[+~]{0,2}[\w./@]+=")
    GROUPS = {"save-dir": "checkpoint", "seed": "common", "log-format": "common", "reset-logging": "common"}
    GROUPS.update({"distributed-init-method": "distributed_training", "distributed-port": "distributed_training"})

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        matches = [(i, match) for i, match in enumerate(map(self.PROGRAM.search, self.words)) if match]
        self.is_training = bool(matches)
        self.start = matches[0][0] + 1 if matches else len(self.words)
        self.is_hydra = bool(matches and (matches[0][1]["a"] or matches[0][1]["b"]))

    def spelling(self, option: str) -> str:
        """`save-dir` as this program writes it: `--save-dir`, or `checkpoint.save_dir` for hydra."""
        if not self.is_hydra:
            return "--" + option
        return self.GROUPS.get(option, "criterion") + "." + option.replace("-", "_")

    def pop(self, option: str) -> Optional[str]:
        """Take every occurrence of an option out; return its last value as fairseq would, None if it is absent.

        Raises ValueError if the value is missing.
        """
        name, value, kept = self.spelling(option), None, self.words[: self.start]
        rest = iter(self.words[self.start :])
        for word in rest:
            key, equals, joined = word.partition("=")
            if (key.lstrip("+") if self.is_hydra else key) != name or (self.is_hydra and not equals):
                kept.append(word)
                continue
            value = joined if equals else next(rest, "--")
            if not equals and value.startswith("--"):
                raise ValueError(f"{name} must have a value, but none follows it.")
        self.words = kept
        return value.strip("'\"") if value and self.is_hydra else value

    def put(self, option: str, value: str) -> None:
        """Set an option, in the place of whatever occurrences there were."""
        self.pop(option)
        if not self.is_hydra:
            self.words += [self.spelling(option), value]
            return
        # Hydra's parser refuses overrides in two places with options between them, so it joins the others.
        overrides = [i for i, word in enumerate(self.words) if i >= self.start and self.OVERRIDE.match(word)]
        # Hydra's grammar wants quotes around odd signs.
        quoted = value if re.fullmatch(r"[\w./:@%+-]+", value) else "'" + value.replace("'", r"\'") + "'"
        self.words.insert(overrides[-1] + 1 if overrides else len(self.words), f"{self.spelling(option)}={quoted}")

    def copy(self) -> FairseqCommand:
        return FairseqCommand(self.words)


def share_cores(peers: int, processes_per_peer: int) -> int:
    """Threads for each process, of the cores this process may run on (the affinity mask, which Slurm sets)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (peers * max(1, processes_per_peer)))


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show this process, as CUDA_VISIBLE_DEVICES names them. Does not start CUDA."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(i) for i in range(count)]
    return names[:count]


def share_gpus(gpus: Sequence[str], peers: int, per_peer: Optional[int]) -> list[list[str]]:
    """The GPUs of each peer: `per_peer` neighbours, by default an equal share; fewer GPUs than peers go round.

    Raises ValueError if `per_peer` asks for more than there are.
    """
    if per_peer is not None and per_peer * peers > len(gpus):
        raise ValueError(
            f"--gpus-per-peer {per_peer} with --peers {peers} needs {per_peer * peers} GPUs, but there are {len(gpus)}"
            " (leave it out and the peers share what there is)."
        )
    if per_peer is None and len(gpus) < peers:
        return [[gpus[i % len(gpus)]] if gpus else [] for i in range(peers)]
    size = len(gpus) // peers if per_peer is None else per_peer
    return [list(gpus[i * size : (i + 1) * size]) for i in range(peers)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see codistill-launch --help).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="codistill-launch",
        allow_abbrev=False,
        usage="codistill-launch --peers N [options] -- COMMAND ...",
        description="Start one fairseq job for each peer, show them all, stop them together.",
        epilog="Any other command than fairseq-train or fairseq-hydra-train (a script, a Slurm step) only gets its "
        "environment; it finds its index in $CODISTILL_PEER. Ctrl-C stops all peers, a second one kills them. "
        "Exit status: 0 when all peers ended well, 130 or 143 after Ctrl-C or SIGTERM, 2 for bad input, "
        "else that of the first peer that failed.",
    )
    add = parser.add_argument
    add("--peers", type=int, required=True, metavar="N", help="how many jobs teach each other")
    add("--gpus-per-peer", type=int, metavar="K", help="GPUs for each peer, 0 for none (default: an equal share)")
    add("--max-restarts", type=int, default=0, metavar="R", help="how often a failed peer starts again (default: 0)")
    add("--log-dir", metavar="DIR", help="logs go to DIR/peer{i}/train.log (default: the command's --save-dir)")
    add("--grace", type=float, default=15.0, metavar="SECONDS", help="from the signal to stop to SIGKILL (default: 15)")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Our options, and the command after the first `--`. Raises ValueError with one sentence."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(list(argv[:split]))
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


def make_plan(argv: Sequence[str], environ: Mapping[str, str]) -> Plan:
    """Decide what each peer runs, and make the directories of their logs. Raises ValueError with one sentence."""
    options = parse_arguments(argv)
    base = FairseqCommand(options.command)
    for option in ("codistill-peer", "codistill-peers"):
        if base.copy().pop(option) is not None:
            raise ValueError(f"{base.spelling(option)} must not be in the command: each peer gets its own.")
    save_dir = base.copy().pop("save-dir") or "checkpoints"
    seed = _seed(base, options.peers)
    run_dir = options.log_dir or save_dir
    asked = options.gpus_per_peer
    gpus = share_gpus([] if asked == 0 else visible_gpus(), options.peers, asked)
    plan = Plan(run_dir, [], options.max_restarts, options.grace, _notes(base, gpus, options.peers))
    shared = _shared_environ(base, options, run_dir, len(gpus[0]), environ)
    ports = iter(_free_ports(options.peers))
    for i in range(options.peers):
        command = _peer_command(base, i, save_dir, seed)
        if len(gpus[i]) > 1 and _needs_rendezvous(base, environ):
            command.put("distributed-init-method", f"tcp://localhost:{next(ports)}")
        own = {**shared, "CODISTILL_PEER": str(i)}
        if gpus[i] or asked == 0:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i])
        plan.peers.append(PeerPlan(i, command.words, own, _make_log(run_dir, i, options.log_dir is not None)))
    return plan


def _seed(base: FairseqCommand, peers: int) -> int:
    text = base.copy().pop("seed") or "1"
    if not re.fullmatch(r"\d+", text) or int(text) + (peers - 1) * SEED_STEP >= 2**32:
        raise ValueError(
            f"{base.spelling('seed')} must be a whole number, below 2**32 with {SEED_STEP} more for each further peer,"
            f" but is {text!r} with {peers} peers."
        )
    return int(text)


def _peer_command(base: FairseqCommand, index: int, save_dir: str, seed: int) -> FairseqCommand:
    command = base.copy()
    if not command.is_training:
        return command
    command.put("save-dir", os.path.join(save_dir, f"peer{index}"))
    command.put("seed", str(seed + index * SEED_STEP))
    if base.copy().pop("log-format") is None:
        command.put("log-format", "json")
    # Hydra's own logging writes its lines in another form than fairseq's, which other tools could not read.
    if command.is_hydra and base.copy().pop("reset-logging") is None:
        command.put("reset-logging", "true")
    return command


def _shared_environ(
    base: FairseqCommand, options: argparse.Namespace, run_dir: str, gpus: int, environ: Mapping[str, str]
) -> dict[str, str]:
    shared = {"CODISTILL_PEERS": str(options.peers), "PYTHONUNBUFFERED": "1"}
    if base.copy().pop("codistill-dir") is None and not environ.get("CODISTILL_DIR"):
        # Absolute, because a command may change its directory (hydra does).
        shared["CODISTILL_DIR"] = os.path.abspath(os.path.join(run_dir, "exchange"))
    if "OMP_NUM_THREADS" not in environ:
        shared["OMP_NUM_THREADS"] = str(share_cores(options.peers, gpus))
    return shared


def _notes(base: FairseqCommand, gpus: Sequence[Sequence[str]], peers: int) -> list[str]:
    notes = []
    if not base.is_training:
        notes.append(
            f"{base.words[0]} is not fairseq-train or fairseq-hydra-train, so its options stay as they are;"
            " let it use $CODISTILL_PEER for its save directory and seed."
        )
    log_format = base.copy().pop("log-format")
    if log_format not in (None, "json"):
        notes.append(f"with log format {log_format!r} the losses cannot be shown here; json is the one that is read.")
    different = len({name for names in gpus for name in names})
    if 0 < different < peers:
        notes.append(f"{peers} peers share {different} GPU{'s' if different > 1 else ''}.")
    return notes


def _needs_rendezvous(base: FairseqCommand, environ: Mapping[str, str]) -> bool:
    """In a Slurm job fairseq makes a group's port from the job's number: the peers' ports would be the same."""
    chosen = any(base.copy().pop(option) is not None for option in ("distributed-init-method", "distributed-port"))
    return base.is_training and "SLURM_JOB_ID" in environ and not chosen


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def _make_log(run_dir: str, index: int, is_log_dir: bool) -> str:
    log = os.path.join(run_dir, f"peer{index}", "train.log")
    try:
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "ab"):
            return log
    except OSError as error:
        name = "--log-dir" if is_log_dir else "--save-dir"
        raise ValueError(f"{name} must be writable, but {log!r} cannot be made: {error.strerror}.") from error


# ------------------------------------------------------------------------------------------------ reading a peer's log


@dataclass
class LogFollower:
    """What a fairseq job's log tells so far. Fed with text in any pieces; passes over what it does not understand.

    Losses are base 2 as fairseq logs them, staleness is in updates, agreement a share 0…1, `ups` updates per second.
    """

    phase: str = "starting"
    update: Optional[int] = None
    total: Optional[int] = None
    epoch: Optional[int] = None
    train_nll: Optional[float] = None
    valid_nll: Optional[float] = None
    best_valid_nll: Optional[float] = None
    alpha: Optional[float] = None
    staleness: Optional[float] = None
    agreement: Optional[float] = None
    ups: Optional[float] = None
    validations: list[float] = field(default_factory=list)
    _partial: str = field(default="", repr=False)
    _max_epoch: int = field(default=0, repr=False)
    _max_update: int = field(default=0, repr=False)
    _valid_name: str = field(default="", repr=False)

    RECORD = re.compile(r'(\{"epoch".*\})\s*$')
    LIMITS = re.compile(r"'max_epoch': (-?\d+), 'max_update': (-?\d+)")
    PHASES = (("begin validation on", "validating"), ("begin training epoch", "training"), ("done training", "ending"))

    def feed(self, text: str) -> None:
        """Read the next piece of the log; an unfinished last line is kept for the next call."""
        *lines, partial = (self._partial + text).split("\n")
        self._partial = partial[-1_000_000:]  # something that never ends its line must not fill the memory
        for line in lines:
            self._read_line(line)

    def _read_line(self, line: str) -> None:
        for words, phase in self.PHASES:
            if words in line:
                self.phase = phase
        limits = self.LIMITS.search(line)
        if limits:
            self._max_epoch, self._max_update = int(limits[1]), int(limits[2])
            self.total = self._max_update if self._max_update > 0 else None
        match = self.RECORD.search(line)
        if match:
            with contextlib.suppress(ValueError, TypeError):  # a broken record is only one line less in the view
                self._read_record(json.loads(match[1]))

    def _read_record(self, record: dict[str, Any]) -> None:
        # fairseq's records differ in a prefix: num_updates, train_num_updates, or a subset's name, valid_num_updates.
        for key in record:
            if key.endswith("num_updates"):
                prefix = key[: -len("num_updates")]
                break
        else:
            return
        values = {name[len(prefix) :]: value for name, value in record.items() if name.startswith(prefix)}
        self.phase = "training"
        self.update, self.epoch = int(values["num_updates"]), int(record["epoch"])
        nll = _number(values, "nll_loss", "loss")
        if prefix in ("", "train_"):
            self._read_training(values, record, nll)
        # Of several validation subsets the first decides, as for fairseq's best checkpoint.
        elif nll is not None and self._valid_name in ("", prefix):
            self._valid_name, self.valid_nll = prefix, nll
            self.validations.append(nll)
            self.best_valid_nll = min((value for value in self.validations if value == value), default=nll)  # not NaN

    def _read_training(self, values: dict[str, Any], record: dict[str, Any], nll: Optional[float]) -> None:
        self.train_nll = self.train_nll if nll is None else nll
        for name in ("alpha", "staleness", "agreement"):
            setattr(self, name, _number(values, "codistill_" + name))
        self.ups = _number(values, "ups") or self.ups
        # fairseq's word for the epochs done, 1.5 in the middle of the second.
        done_epochs = float(record.get("update") or 0)
        if self._max_epoch > 0 and done_epochs > 0:
            by_epochs = round(self.update / done_epochs * self._max_epoch)
            self.total = min(by_epochs, self._max_update) if self._max_update > 0 else by_epochs

    @property
    def seconds_left(self) -> Optional[float]:
        """Time to the last update at the present speed; None while the total or the speed is unknown."""
        if self.total is None or self.update is None or not self.ups:
            return None
        return max(0, self.total - self.update) / self.ups


def _number(values: Mapping[str, Any], *names: str) -> Optional[float]:
    """The first of these that is logged; fairseq writes most numbers as strings."""
    return next((float(values[name]) for name in names if values.get(name) is not None), None)


def last_lines(path: str, count: int = TAIL_LINES) -> list[str]:
    """The end of a log, without control codes, long lines cut."""
    from rich.text import Text

    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - 65536))
        lines = log.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    plain = ["".join(filter(str.isprintable, Text.from_ansi(line.expandtabs()).plain)).rstrip() for line in lines]
    # The last words of the error matter, not another record of losses or the configuration.
    limits = [(line, 70 if LogFollower.RECORD.search(line) else 300) for line in plain if line]
    return [line if len(line) <= limit else line[:limit] + " ..." for line, limit in limits[-count:]]


# --------------------------------------------------------------------------------------------- keeping a peer going


class _InheritedOutput:
    """Elastic's `LogsSpecs` that redirects nothing: its own truncate the file, ours must append (see `Peer.start`)."""

    def reify(self, envs: dict[int, dict[str, str]]) -> Any:
        from torch.distributed.elastic.multiprocessing import LogsDest

        return LogsDest(stdouts={0: ""}, stderrs={0: ""}, error_files={0: os.devnull})


class Peer:
    """One peer: a process group under an elastic context of its own, as a context kills all it holds when one fails."""

    def __init__(self, plan: PeerPlan, peers: int) -> None:
        self.plan, self.peers = plan, peers
        self.progress = LogFollower()
        self.restarts = 0
        self.status: Optional[int] = None  # exit status; None while it runs
        self.stopping = self.killed = False
        self.began, self.seconds = time.monotonic(), 0.0
        self.context: Any = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    @property
    def name(self) -> str:
        return f"peer{self.plan.index}"

    @property
    def state(self) -> str:
        """In the view's words: starting, training, validating, ending, stopping, stopped, finished, failed."""
        if self.status is None:
            return "stopping" if self.stopping else self.progress.phase
        if self.status == 0:
            return "finished"
        return "stopped" if self.stopping else f"failed ({self.status})"

    def start(self) -> None:
        """Start (again). All output is appended to the log, under a line that names attempt and command."""
        from torch.distributed.elastic.multiprocessing import start_processes

        self.status, self.killed, self.progress.phase = None, False, "starting"
        environ = {**self.plan.environ, "CODISTILL_RESTART": str(self.restarts)}
        self._write_header(environ)
        # `exec` leaves no shell behind; >> lets every process of the peer append without overwriting another's lines.
        script = 'log=$1; shift; exec "$@" >>"$log" 2>&1 </dev/null'
        arguments = ("-c", script, "codistill-launch", self.plan.log, *self.plan.command)
        # In the main thread elastic installs signal handlers that raise anywhere, even between a fork and its record.
        with ThreadPoolExecutor(1) as thread:
            self.context = thread.submit(
                start_processes, self.name, "/bin/sh", {0: arguments}, {0: environ}, _InheritedOutput()
            ).result()

    def _write_header(self, environ: Mapping[str, str]) -> None:
        words = [f"{name}={shlex.quote(value)}" for name, value in environ.items()]
        words += [shlex.quote(word) for word in self.plan.command]
        head = f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} | codistill-launch | {self.name} of {self.peers}"
        # A full disk must not stop the other peers: this one fails by itself when it writes.
        with contextlib.suppress(OSError), open(self.plan.log, "a+", encoding="utf-8") as log:
            self._offset = self._offset or log.tell()
            log.write(("\n" if log.tell() else "") + f"{head} | restart {self.restarts} | {' '.join(words)}\n")

    @property
    def pid(self) -> int:
        return self.context.pids()[0]

    def poll(self) -> bool:
        """Read the log, ask for the processes; True when the peer has ended since the last call."""
        if self.status is not None:
            return False
        self.seconds = time.monotonic() - self.began
        result = self.context.wait(timeout=0)
        self._follow()  # after the question, so that the last words of a dead peer are read
        # When stopping, the rest of the group has its time to end well too, as long as the grace lasts.
        if result is None or (self.stopping and not self.killed and self._group_lives()):
            return False
        self.signal(signal.SIGKILL)  # what the peer left behind: data-loader workers, other ranks
        failure = result.failures.get(0)
        code = failure.exitcode if failure else 0
        self.status = code if code >= 0 else 128 - code
        return True

    def _follow(self) -> None:
        with contextlib.suppress(OSError), open(self.plan.log, "rb") as log:
            log.seek(self._offset)
            data = log.read(1 << 22)
            self._offset += len(data)
            self.progress.feed(self._decoder.decode(data))

    def signal(self, number: int) -> None:
        """Send a signal to every process of the peer's group."""
        self.killed = self.killed or number == signal.SIGKILL
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _group_lives(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            # As process 1 of a container we inherit orphans; their zombies would count as alive.
            os.waitpid(-self.pid, os.WNOHANG)
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """End every process of the peer now."""
        if self.context is not None and self.status is None:
            self.signal(signal.SIGKILL)
            self.context.close(death_sig=signal.SIGKILL)


class Signals:
    """SIGINT, SIGTERM and SIGHUP as data for the loop, and SIGCHLD to wake it: nothing is ever interrupted half-way."""

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        watched = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it: so do we
            watched.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, lambda *_: None) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> set[int]:
        """The signals that ask to stop and came within this time; returns at once when a child ends."""
        if not select.select([self._reader], [], [], seconds)[0]:
            return set()
        return set(self._reader.recv(4096)) - {signal.SIGCHLD}


class Supervisor:
    """The loop: watches all peers, restarts those that fail, passes signals on, ends when all have ended."""

    def __init__(self, plan: Plan, view: PlainView) -> None:
        self.plan, self.view = plan, view
        self.peers = [Peer(peer, len(plan.peers)) for peer in plan.peers]
        self.first_failure = 0  # its exit status
        self.stop_signal: Optional[int] = None
        self._stopped_at = self._deadline = 0.0

    def run(self) -> int:
        """Start all, watch all; returns the launcher's exit status."""
        with Signals() as signals, self.view:
            try:
                for note in self.plan.notes:
                    self.view.tell(f"note: {note}")
                for peer in self.peers:
                    peer.start()
                    self.view.tell(f"{peer.name}: {_resources(peer.plan)}, log {peer.plan.log}")
                while any(peer.status is None for peer in self.peers):
                    self.view.update(self.peers)
                    for number in signals.wait(POLL_SECONDS):
                        self._on_signal(number)
                    if self.stop_signal is not None and time.monotonic() > self._deadline:
                        self._signal_all(signal.SIGKILL)
                    for peer in self.peers:
                        if peer.poll() and peer.status and not peer.stopping:
                            self._on_failure(peer)
                self.view.update(self.peers)
            finally:
                for peer in self.peers:
                    peer.kill()
        return self.first_failure if self.stop_signal is None else 128 + self.stop_signal

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self.stop_signal is None:
            grace = self.plan.grace_seconds
            self.stop_signal, self._stopped_at, self._deadline = number, now, now + grace
            name = signal.Signals(number).name
            self.view.tell(f"{name}: stopping all peers within {grace:g} s (Ctrl-C again: at once).")
            for peer in self.peers:
                peer.stopping = peer.status is None
            self._signal_all(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        elif number == signal.SIGINT and now - self._stopped_at > 0.5:  # a wrapper may pass one Ctrl-C on twice
            self._deadline = now

    def _signal_all(self, number: int) -> None:
        for peer in self.peers:
            if peer.status is None:
                peer.signal(number)

    def _on_failure(self, peer: Peer) -> None:
        status = f"exit status {peer.status}{_signal_name(peer.status)}"
        where = f"after {_duration(peer.seconds)}, at update {_text(peer.progress.update)}"
        report = [f"{peer.name} failed with {status} {where}. The end of its log:"]
        report += [f"  | {line}" for line in last_lines(peer.plan.log)]
        if peer.restarts < self.plan.max_restarts:
            peer.restarts += 1
            report.append(f"{peer.name} is started again: restart {peer.restarts} of {self.plan.max_restarts}.")
            self.view.tell("\n".join(report), is_error=True)
            peer.start()
            return
        self.first_failure = self.first_failure or peer.status
        others = "; the other peers go on" if any(other.status is None for other in self.peers) else ""
        report.append(f"{peer.name} is not started again{others}. Log: {peer.plan.log}")
        self.view.tell("\n".join(report), is_error=True)


def _resources(plan: PeerPlan) -> str:
    gpus = plan.environ.get("CUDA_VISIBLE_DEVICES")
    threads = plan.environ.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
    return (f"GPU {gpus}, " if gpus else "") + f"{threads} thread{'' if threads == '1' else 's'}"


def _signal_name(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(status - 128).name})" if status > 128 else ""
    return ""


# ------------------------------------------------------------------------------------------------------------ the view


def _text(value: Optional[float], spec: str = "") -> str:
    return "-" if value is None else format(value, spec)


def _duration(seconds: Optional[float]) -> str:
    """Like 45s, 3m20s, 2h05m, 1d02h."""
    if seconds is None:
        return "-"
    minutes, left = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{left:02d}s" if minutes else f"{left}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def sparkline(values: Sequence[float], width: int = 10) -> str:
    """The course of the last values, one sign each: low ▁ to high █."""
    shown = [value for value in values[-width:] if value == value and abs(value) != float("inf")]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low or 1.0))] for value in shown)


def progress_line(peer: Peer) -> str:
    """One peer's progress as plain words, only what its log has told."""
    seen = peer.progress
    share = f" ({seen.update / seen.total:.0%})" if seen.update is not None and seen.total else ""
    parts = [f"{peer.name} {peer.state}", f"update {_text(seen.update)}/{_text(seen.total)}{share}"]
    parts += [f"epoch {seen.epoch}"] if seen.epoch is not None else []
    parts += [f"loss {seen.train_nll:.3f}"] if seen.train_nll is not None else []
    parts += [f"valid nll {seen.valid_nll:.3f} (best {seen.best_valid_nll:.3f})"] if seen.validations else []
    parts += [f"alpha {seen.alpha:.3g}"] if seen.alpha is not None else []
    parts += [f"staleness {seen.staleness:.0f}"] if seen.staleness is not None else []
    parts += [f"agreement {seen.agreement:.0%}"] if seen.agreement is not None else []
    parts += [f"{seen.ups:.3g} updates/s, {_duration(seen.seconds_left)} left"] if seen.ups else []
    return " | ".join(parts)


class PlainView:
    """One line for each validation of a peer, and now and then between: for logs, so without control codes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.began = time.monotonic()
        self._told: dict[str, tuple[float, int, Optional[int]]] = {}  # peer: when, validations, update

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def tell(self, text: str, is_error: bool = False) -> None:
        """Say something that happened once."""
        print(text, flush=True)

    def update(self, peers: Sequence[Peer]) -> None:
        """Show where the peers are."""
        now = time.monotonic()
        for peer in peers:
            seen = peer.progress
            when, validations, update = self._told.get(peer.name, (self.began, 0, None))
            is_due = seen.update != update and now - when >= PLAIN_SECONDS
            if is_due or len(seen.validations) != validations:
                self._told[peer.name] = (now, len(seen.validations), seen.update)
                self.tell(f"{time.strftime('%H:%M:%S')} {progress_line(peer)}")


class LiveView(PlainView):
    """A table of all peers that is drawn anew in its place; what happens once is printed above it."""

    STYLES = {"training": "green", "validating": "cyan", "finished": "bold green", "failed": "bold red"}

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(plan)
        self.console = Console(highlight=False)
        self.is_utf8 = self.console.encoding.startswith("utf")
        self._spinners: dict[str, Any] = {}
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def tell(self, text: str, is_error: bool = False) -> None:
        from rich.text import Text

        first, newline, rest = text.partition("\n")
        self.console.print(Text(first, "bold red" if is_error else "") + Text(newline + rest, "dim"), soft_wrap=True)

    def update(self, peers: Sequence[Peer]) -> None:
        from rich import box
        from rich.markup import escape
        from rich.panel import Panel

        elapsed = _duration(time.monotonic() - self.began)
        title = f"codistill-launch · {len(peers)} peer{'s' if len(peers) > 1 else ''} · {elapsed}"
        subtitle = escape(f"tail -f {self.plan.run_dir}/peer*/train.log · Ctrl-C stops all")
        panel = Panel(self._table(peers), title=title, subtitle=subtitle, box=box.ROUNDED, border_style="dim")
        self._live.update(panel, refresh=True)

    def _table(self, peers: Sequence[Peer]) -> Any:
        from rich.table import Table

        columns = [column for column in self._columns(peers) if column[1] <= self.console.width]
        table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for name, _, _ in columns:
            justify = "left" if name in ("peer", "state", "progress", "") else "right"
            table.add_column(name, justify=justify, ratio=1 if name == "progress" else None, no_wrap=True)
        for peer in peers:
            table.add_row(*(cell(peer) for _, _, cell in columns))
        return table

    def _columns(self, peers: Sequence[Peer]) -> list[tuple[str, int, Any]]:
        """Name, the narrowest terminal that shows it, and the cell. What no peer logs has no column."""

        def logged(name: str) -> int:
            return 0 if any(getattr(peer.progress, name) is not None for peer in peers) else sys.maxsize

        return [
            ("peer", 0, lambda peer: str(peer.plan.index)),
            ("state", 0, self._state),
            ("progress", 0, self._bar),
            ("update", 0, lambda peer: f"{_text(peer.progress.update)}/{_text(peer.progress.total)}"),
            ("epoch", 90, lambda peer: _text(peer.progress.epoch)),
            ("loss", 0, lambda peer: _text(peer.progress.train_nll, ".3f")),
            ("valid", 0, self._valid),
            ("best", 100, lambda peer: _text(peer.progress.best_valid_nll, ".3f")),
            ("", 120 if self.is_utf8 else sys.maxsize, lambda peer: sparkline(peer.progress.validations)),
            ("alpha", logged("alpha"), lambda peer: _text(peer.progress.alpha, ".3g")),
            ("stale", max(80, logged("staleness")), lambda peer: _text(peer.progress.staleness, ".0f")),
            ("agree", max(100, logged("agreement")), lambda peer: _text(peer.progress.agreement, ".0%")),
            ("upd/s", 110, lambda peer: _text(peer.progress.ups, ".3g")),
            ("left", 0, lambda peer: _duration(peer.progress.seconds_left)),
            ("restarts", 0 if any(peer.restarts for peer in peers) else sys.maxsize, lambda peer: str(peer.restarts)),
        ]

    def _state(self, peer: Peer) -> Any:
        from rich.spinner import Spinner
        from rich.text import Text

        style = self.STYLES.get(peer.state.split()[0], "yellow")
        if peer.status is not None:
            return Text(peer.state, style)
        spinner = self._spinners.setdefault(peer.name, Spinner("dots" if self.is_utf8 else "line"))
        spinner.update(text=Text(peer.state, style), style=style)
        return spinner

    @staticmethod
    def _bar(peer: Peer) -> Any:
        from rich.progress_bar import ProgressBar

        total = peer.progress.total
        return ProgressBar(total=total or 1, completed=peer.progress.update or 0 if total else 0)

    @staticmethod
    def _valid(peer: Peer) -> Any:
        from rich.text import Text

        seen = peer.progress
        is_best = bool(seen.validations) and seen.valid_nll == seen.best_valid_nll
        return Text(_text(seen.valid_nll, ".3f"), "bold green" if is_best else "")


def print_summary(plan: Plan, peers: Sequence[Peer]) -> None:
    """How each peer ended, where its log is, and what to do next."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    plain = {} if sys.stdout.isatty() else {"force_terminal": False, "color_system": None, "width": 160}
    console = Console(highlight=False, markup=False, **plain)
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD)
    for name in ("peer", "status", "updates", "best valid nll", "restarts", "time", "log"):
        table.add_column(name, justify="left" if name in ("status", "log") else "right", overflow="fold")
    for peer in peers:
        best, update = _text(peer.progress.best_valid_nll, ".3f"), _text(peer.progress.update)
        row = (peer.plan.index, peer.state, update, best, peer.restarts, _duration(peer.seconds), peer.plan.log)
        table.add_row(*map(str, row))
    console.print(table)
    if any(peer.stopping and peer.progress.update for peer in peers):
        console.print("The same command again goes on from the last checkpoints.", soft_wrap=True)
    if any(peer.progress.validations for peer in peers):
        console.print(f"Table and curves:  codistill-report {shlex.quote(plan.run_dir)}", soft_wrap=True)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command. Returns its exit status; bad input is one sentence on stderr and 2."""
    try:
        plan = make_plan(sys.argv[1:] if argv is None else argv, os.environ)
    except ValueError as error:
        print(f"codistill-launch: {error}", file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a peer's log may hold any sign, a terminal of LANG=C shows few
    # What elastic reports of a failed process we report with the end of its log.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    is_live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    supervisor = Supervisor(plan, LiveView(plan) if is_live else PlainView(plan))
    status = supervisor.run()
    print_summary(plan, supervisor.peers)
    return status


if __name__ == "__main__":
    sys.exit(main())
