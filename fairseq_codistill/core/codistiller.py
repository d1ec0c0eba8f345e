"""The exchange protocol of a group: exchanges snapshots when due, and puts the peers' into the stale copies.

Every rank of a data-parallel group has a codistiller; rank 0 alone has a background exchange, which moves the bytes. Its
decision and the weights that it read are broadcast, so that all ranks hold the same peers at the same update. If rank 0
has no new snapshot, no rank switches.
Training never stops because of a peer: whatever is wrong with one is a warning, and costs at most its teaching.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from torch import nn

from ..exchange.background import BackgroundExchange
from ..exchange.exchange import SILENT_SECONDS, Exchange, Run
from ..exchange.manifest import BadSnapshot, Manifest
from ..exchange.snapshot import Weights, fingerprint, tensors_of
from ..exchange.structure import structure
from ..exchange.worker import Worker
from . import group
from .barrier import Barrier
from .int8 import load
from .replica import freeze, replica
from .schedules import AlphaSchedule
from .teaching import Held, Teachers, Teaching
from .topology import Edge, learners_of, teachers_of

logger = logging.getLogger(__name__)

LOCKSTEP_WAIT = 600.0  # seconds; in lockstep a peer that is this late is taken for dead
_LATE_LOOKS = 10  # looks in an interval for a snapshot that was not there when the exchange was due
_ANSWER = 300.0  # seconds for the storage to answer before training begins
_READ = 60.0  # seconds to wait for the teachers' snapshots where the exchange goes on in the background


@dataclass
class Codistiller:
    """Exchanges snapshots every `interval` updates and says, for each update, who teaches and how strongly.

    `edges`: see `topology`; `wait`: seconds to wait at the start for the first snapshots; `max_staleness`: updates after
    which a snapshot no longer teaches; `lockstep`: wait for the teachers' snapshot of the very same update;
    `wire_dtype`: what floats travel as (None: float32 as bfloat16, others as they are); `in_background`: exchange beside
    the training, unless in lockstep; `updates`: where training ends, if known; `needs_peers`: False for the smoothing
    controls, which need no peer; `frozen`: offline teachers; `every`: distil on every k-th update only.
    """

    peer: int
    peers: int
    schedule: AlphaSchedule
    exchange: Optional[Exchange] = None
    edges: Set[Edge] = field(default_factory=set)
    interval: int = 2500
    peer_dtype: Optional[torch.dtype] = None
    lockstep: bool = False
    wait: float = 0.0
    max_staleness: Optional[int] = None
    needs_peers: bool = True
    frozen: Sequence[nn.Module] = ()
    model_config: Dict[str, Any] = field(default_factory=dict)
    wire_dtype: Optional[torch.dtype] = None
    in_background: bool = True
    updates: Optional[int] = None
    every: int = 1
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.epoch = 1
        self.valid_loss: Optional[float] = None
        self.published: Optional[nn.Module] = None  # a model of the same shapes whose weights go out instead of the trained
        self._trained: Optional[nn.Module] = None
        self._update: Optional[int] = None
        self._started = 0  # first update since this start
        self.teachers = Teachers(self.schedule, self.every, self.max_staleness, self.needs_peers, self.frozen)
        self._due: List[int] = []  # teachers of whom nothing new has come since the exchange was due
        self._moves: Optional[BackgroundExchange] = None  # rank 0's alone
        self._waits: Optional[Barrier] = None
        self._own_folder = Worker()  # for this peer's own folder of the exchange
        self._exchanged: Optional[float] = None  # when, by time.monotonic
        self._checkpoints = (0, 0)  # updates of the last checkpoint but one, and of the last
        self._left = False

    # Called by the hook.

    def join(self, run: Run) -> None:
        """Before training: agree with the other peers on the run. Raises ValueError, in one sentence, on every rank."""
        if self.exchange is not None:
            group.by_rank_0(lambda: self._ask_own_folder(self._shared.join, run))

    def load_frozen(self, load: Callable[[], Sequence[nn.Module]]) -> None:
        """Before training: load the offline teachers, on every rank. Raises on all where it fails on one."""
        self.teachers.frozen = group.by_all(load)

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """`model`: the unwrapped one, on its device and in its dtype."""
        self.epoch, self._trained = epoch, model
        if self.teachers.frozen:
            group.by_all(self._freeze)

    def _freeze(self) -> None:
        for teacher in self.teachers.frozen:
            freeze(teacher, next(self._model.parameters()).device, self.peer_dtype, _dtype_of(self._model))

    def checkpointed(self) -> None:
        """A checkpoint is being written. Only the one before it is sure to be whole, should this process be killed now."""
        self._checkpoints = (self._checkpoints[1], (self._update + 1) if self._update is not None else 0)

    def teaching(self, update: int) -> Optional[Teaching]:
        """The peers that teach in this update (0, 1, …), or None: α is 0, no peer can, or `every` skips this update.

        Exchanges first, when that is due.

        Idempotent per update (micro-batches, a re-run).
        """
        if update != self._update:
            first, self._update = self._update is None, update
            if self.exchange is not None:
                self._exchange_if_due(update, first)
        return self.teachers.at(self.epoch, update)

    def drain(self, seconds: float) -> None:
        """Wait for what is being published, but no longer than `seconds`; nothing new is begun."""
        if self._moves is not None:
            self._moves.drain(seconds)

    @property
    def may_be_complete(self) -> bool:
        """Training has begun, and has come to --max-update, if there is one."""
        return self._update is not None and (self.updates is None or self._update + 1 >= self.updates)

    def end(self, completed: bool) -> None:
        """Training is over: publish the last weights, so that a slower peer still has a teacher, and leave."""
        if self._left or self.exchange is None or not self._leads:
            return
        self._left = True
        if self._moves is None or self._update is None:
            with contextlib.suppress(OSError):
                self._own_folder.ask(self.exchange.leave, seconds=1.0)
            self._own_folder.stop()
            return
        done = self._update + 1
        self._background.totals.updates = done - self._started
        publish_last = lambda: self._publish(done, done=True) if completed else None  # noqa: E731
        self._background.end("ended" if completed else "stopped", publish_last)

    # The exchange. Every rank of a group goes through it; only rank 0 has a background exchange.

    def _begin(self, update: int) -> None:
        self._checkpoints = (update, update)  # the one that was resumed from is there
        self._started = update
        group.by_rank_0(lambda: self._begin_exchange(update))
        self._waits = Barrier(self._shared, self._moves, self._teacher_indices, self.sleep)

    def _begin_exchange(self, update: int) -> None:
        architecture = fingerprint(self._model)
        past = self._ask_own_folder(self._past, update, architecture)
        wire = self.wire_dtype or (torch.bfloat16 if _dtype_of(self._model) == torch.float32 else None)
        self._moves = BackgroundExchange(
            self._shared, self._teacher_indices, architecture, tensors_of(self._model), wire,
            self.in_background and not self.lockstep, self.updates, self.clock, self._own_folder,
        )  # fmt: skip
        self._background.start()
        self._warn_of_options(update, past)

    def _past(self, update: int, architecture: str) -> Optional[Manifest]:
        """Begin at `update`; this peer's last snapshot before this start, if there is one."""
        past = None
        with contextlib.suppress(BadSnapshot):
            past = self._shared.newest(self.peer) if update else None
        self._shared.begin(update, architecture, structure(self._model))
        return past

    def _warn_of_options(self, update: int, past: Optional[Manifest]) -> None:
        """Warn of values that were hardly meant; nothing is changed."""
        values, updates = {"interval": self.interval, "every": self.every, "burn-in": self.schedule.burn_in}, self.updates
        for name, value in values.items() if updates else ():
            if updates and value >= updates:
                logger.warning(
                    f"codistillation: --codistill-{name} is {value}, which is not below --max-update {updates}, so this "
                    f"peer will learn nothing from the others; it must be far below, such as {max(1, updates // 10)}"
                )
        if self.schedule.warmup:
            logger.info(
                f"codistillation: α is 0 in epoch 1 and grows in until epoch {self.schedule.warmup + 1} "
                "(--codistill-alpha-warmup-epochs; 0: peers teach from the first exchange on)"
            )
        with contextlib.suppress(Exception):  # an older version's manifest, or one that was tampered with
            change = self.schedule.change_from(past.options, self.epoch, update) if past is not None else None
            if past is not None and change is not None:
                logger.warning(f"codistillation: since this run's snapshot of update {past.update}: {change}")

    def _ask_own_folder(self, work: Callable, *args: Any) -> Any:
        """Before training: what `work`, on this peer's folder, gives. Raises ValueError where the storage does not answer."""
        if not self._own_folder.start():
            return work(*args)
        try:
            return self._own_folder.ask(work, *args, seconds=_ANSWER)
        except TimeoutError:
            raise ValueError(
                f"codistill_dir must be storage that answers, but {self._shared.store} has not answered for {_ANSWER:g} s; "
                "is its server down, or was another directory meant?"
            ) from None

    def _exchange_if_due(self, update: int, first: bool) -> None:
        if first:
            self._begin(update)
        is_due = first or update % self.interval == 0
        # What came too late for the exchange is not left to lie until the next one.
        is_late = self._due and not self.lockstep and update % max(1, self.interval // _LATE_LOOKS) == 0
        if not is_due and not is_late:
            return
        start, asked_for = time.perf_counter(), self._asked_for_seconds()
        if is_due:
            self._exchange(update, first)
        else:
            self._reload()
        if self._leads:
            self._background.totals.visible_s += time.perf_counter() - start - (self._asked_for_seconds() - asked_for)
            if first:
                self._background.watch()

    def _exchange(self, update: int, first: bool) -> None:
        if self._leads:
            try:
                self._show(update, first)
            except Exception as error:  # the other ranks wait for this one
                logger.warning(f"codistillation: at update {update} nothing was published: {error}; training goes on")
        if first and self.wait:
            self._barrier.await_first_snapshots(self.wait)
        self._due = list(self._teacher_indices)
        if not self.lockstep:
            self._reload(first)
        # In lockstep a run resumed between two exchanges goes back to what was held there.
        elif update >= self.interval:
            self._barrier.await_update(update - update % self.interval, self.wait or LOCKSTEP_WAIT)
            self._reload(True, update - update % self.interval)

    def _show(self, update: int, first: bool) -> None:
        """Heartbeat, and the weights when they are due."""
        now = time.monotonic()
        seconds, self._exchanged = None if first or self._exchanged is None else now - self._exchanged, now
        self._background.at(update, self.teachers.updates(), seconds)
        if update % self.interval == 0:
            self._publish(update, done=False)

    def _publish(self, update: int, done: bool) -> None:
        needed_from = self._needed_from if self.lockstep else None
        self._background.publish(
            tensors_of(self._model if self.published is None else self.published), update, needed_from,
            epoch=self.epoch, fingerprint=self._background.fingerprint,
            model=self.model_config, time=self.clock(), valid_loss=self.valid_loss,
            resumes_from=self._checkpoints[0], done=done, options=self.schedule.options(),
        )  # fmt: skip

    def _needed_from(self) -> Optional[int]:
        """Of this peer's snapshots, the earliest that a learner in lockstep may still ask for, while the others would wait."""
        learners, patience = learners_of(self.peer, self.edges), max(self.wait or LOCKSTEP_WAIT, SILENT_SECONDS)
        return self._shared.needed_from(learners, self.interval, patience)

    def _reload(self, look: bool = False, update: Optional[int] = None) -> None:
        """Put the snapshots that are ready into the peers, on every rank. `look`: read now what is there, of `update`."""
        if self._due and (look or not self.in_background):
            self._barrier.read(self._due, update, (self.wait or LOCKSTEP_WAIT) if self.lockstep else _READ)
        news: List[Tuple[int, Manifest, Weights]] = []
        if self._leads:
            for teacher in self._due:
                found = self._background.take(teacher)
                if found is not None:
                    news.append((teacher, *found))
            self._background.warn_missing(self._due, self._update or 0)
        for peer, manifest in group.share([(peer, manifest) for peer, manifest, _ in news]):
            self._take(peer, manifest, next((weights for p, _, weights in news if p == peer), None))
            self._due.remove(peer)
        if news:
            self._background.holds(self.teachers.updates())

    def _take(self, peer: int, manifest: Manifest, weights: Optional[Weights]) -> None:
        """Put a snapshot into the peer's model; ranks other than 0 get the tensors from rank 0.

        What fails on one rank, for want of memory, say, costs the peer's teaching on all."""
        start, reason = time.perf_counter(), "another rank of this peer's group could not"
        try:
            model = self._filled(peer, weights)
        except Exception as error:
            model, reason = None, f"{type(error).__name__}: {error}"  # and not the error, whose frames hold the memory
        if not group.all_well(model is not None, next(self._model.parameters()).device):
            self.teachers.held.pop(peer, None)
            logger.warning(
                f"codistillation: peer {peer}: its snapshot of update {manifest.update} could not be loaded ({reason}); "
                "training goes on without it until its next one"
            )
            return
        assert model is not None, "all ranks are well"
        if group.is_grouped():
            for tensor in tensors_of(model).values():
                dist.broadcast(tensor, src=0)
        self.teachers.held[peer] = Held(model, manifest.update)
        if self._leads:
            self._background.totals.copy_s += time.perf_counter() - start
        logger.info(f"codistillation: learning from peer {peer} as of its update {manifest.update}")

    def _filled(self, peer: int, weights: Optional[Weights]) -> nn.Module:
        held = self.teachers.held.get(peer)
        model = held.model if held else replica(self._model, self.peer_dtype)
        if weights is not None:
            load(model, weights)
        return model

    # Small questions. The first four are for what is there from the first update on.

    @property
    def _shared(self) -> Exchange:
        assert self.exchange is not None, "without peers nothing is exchanged"
        return self.exchange

    @property
    def _model(self) -> nn.Module:
        assert self._trained is not None, "begin_epoch comes first"
        return self._trained

    @property
    def _background(self) -> BackgroundExchange:
        assert self._moves is not None, "rank 0 alone moves snapshots, from its first update on"
        return self._moves

    @property
    def _barrier(self) -> Barrier:
        assert self._waits is not None, "the first update comes first"
        return self._waits

    def _asked_for_seconds(self) -> float:
        """Copying weights, and waiting where that was asked for: not counted as visible."""
        return self._background.totals.copy_s + self._background.totals.waited_s if self._leads else 0.0

    @property
    def _leads(self) -> bool:
        return group.leads()

    @property
    def _teacher_indices(self) -> List[int]:
        return teachers_of(self.peer, self.edges)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
