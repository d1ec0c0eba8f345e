"""Who teaches me now: holds the peers' stale copies, exchanges snapshots when due, and knows each one's age.

Every rank of a data-parallel group has a codistiller; rank 0 alone has a courier, which touches the exchange. Its decision
and the weights that it read are broadcast, so that all ranks hold the same peers at the same update; what is late is
skipped by all of them together.
Training never stops because of a peer: whatever is wrong with one is a warning, and costs at most its teaching.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..exchange.courier import Courier
from ..exchange.exchange import SILENT_SECONDS, Exchange, Run
from ..exchange.manifest import BadSnapshot, Manifest, plain
from ..exchange.snapshot import Weights, as_sent, fingerprint, tensors_of
from ..exchange.structure import structure
from ..exchange.worker import Worker
from . import group, precision
from .int8 import load
from .meeting import Meeting
from .pull import Masters, Pull, begin_with
from .replica import freeze, replica
from .schedules import AlphaSchedule
from .topology import Edge, learners_of, teachers_of

logger = logging.getLogger(__name__)

LOCKSTEP_WAIT = 600.0  # seconds; in lockstep a peer that is this late is taken for dead
_LATE_LOOKS = 10  # looks in an interval for a snapshot that was not there when the exchange was due
_ANSWER = 300.0  # seconds for the storage to answer before training begins
_READ = 60.0  # seconds to wait for the teachers' snapshots where the exchange goes on in the background


@dataclass(frozen=True)
class Teaching:
    """What a training sample carries to the criterion: α, and the peers to learn from, each frozen and in eval mode.

    Peers run only when their outputs are asked for, one after another; the criterion decides what it keeps of each.
    """

    alpha: float
    peers: Sequence[nn.Module] = ()
    staleness: float = 0.0  # updates, mean over the peers
    names: Sequence[str] = ()  # of the peers, for messages
    widen: Optional[Callable[[str], None]] = None  # gives all peers the model's precision, where theirs was only a guess

    def outputs(self, net_input: Dict[str, Any]) -> Iterator[Tuple[nn.Module, Any]]:
        """Each peer with what it predicts for `net_input`; no gradient is recorded."""
        for peer in self.peers:
            with torch.no_grad():
                output = peer(**self.cast(peer, net_input))
            yield peer, output

    @staticmethod
    def cast(peer: nn.Module, net_input: Dict[str, Any]) -> Dict[str, Any]:
        """The input with its floats (images, speech) in the peer's precision."""
        dtype = next((p.dtype for p in peer.parameters() if p.is_floating_point()), None)
        return {name: _cast(value, dtype) for name, value in net_input.items()}

    def of(self, part: str) -> Teaching:
        """The same teaching by the sub-models `peer.models[part]`: one language pair of a multilingual model."""
        return replace(self, peers=[peer.models[part] for peer in self.peers])

    def settle_precision(self, peer: nn.Module, net_input: Dict[str, Any]) -> None:
        """Before `peer` runs for the first time: give up the precision that was chosen for it, if it cannot run in it."""
        reason = precision.failure(peer, self.cast(peer, net_input)) if self.widen else None
        if reason is not None:
            self.widen(reason)


@dataclass
class _Held:
    """A peer as I hold it: its model, and the manifest of the weights that are in it."""

    model: nn.Module
    manifest: Manifest


@dataclass
class Codistiller:
    """Exchanges snapshots every `interval` updates and says, for each update, who teaches and how strongly.

    `edges`: see `topology`; `wait`: seconds to wait at the start for the first snapshots; `max_staleness`: updates after
    which a snapshot no longer teaches; `lockstep`: wait for the teachers' snapshot of the very same update;
    `wire_dtype`: what floats travel as (None: float32 as bfloat16, others as they are); `in_background`: exchange beside
    the training, unless in lockstep; `updates`: where training ends, if known; `needs_peers`: False for the smoothing
    controls, which teach without a peer; `frozen`: offline teachers; `every`: of so many updates one is taught; `peer_dtype`:
    a dtype for the peers, None for the model's, or `precision.AUTO`; `shared_init`: begin with peer 0's first snapshot; `pull`:
    λ of `core.pull`; `masters`: the wide copies that the optimizer steps on.
    """

    peer: int
    peers: int
    schedule: AlphaSchedule
    exchange: Optional[Exchange] = None
    edges: Set[Edge] = field(default_factory=set)
    interval: int = 2500
    peer_dtype: Union[torch.dtype, str, None] = None
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
    shared_init: bool = False
    pull: float = 0.0
    masters: Masters = dict
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.epoch = 1
        self.valid_loss: Optional[float] = None
        self._model: Optional[nn.Module] = None
        self._update: Optional[int] = None
        self._started = 0  # my first update in this life
        self._held: Dict[int, _Held] = {}
        self._due: List[int] = []  # teachers of whom nothing new has come since the exchange was due
        self._courier: Optional[Courier] = None  # rank 0's alone
        self._meeting: Optional[Meeting] = None
        self._mine = Worker()  # for my own folder of the exchange
        self._exchanged: Optional[float] = None  # when, by time.monotonic
        self._checkpoints = (0, 0)  # updates of the last checkpoint but one, and of the last
        self._left = False
        self._pull: Optional[Pull] = None
        self._guessed = False  # the peers' precision: then it may be given up

    # What the hook tells.

    def join(self, run: Run) -> None:
        """Before training: agree with the other peers on the run. Raises ValueError, in one sentence, on every rank."""
        if self.exchange is not None:
            group.by_rank_0(lambda: self._ask_mine(self.exchange.join, run))

    def load_frozen(self, load: Callable[[], Sequence[nn.Module]]) -> None:
        """Before training: load the offline teachers, on every rank. Raises on all where it fails on one."""
        self.frozen = group.by_all(load)

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """`model`: the unwrapped one, on its device and in its dtype."""
        self.epoch, self._model = epoch, model
        if self.peer_dtype == precision.AUTO:
            self._choose_precision()
        if self.frozen:
            group.by_all(self._freeze)

    def _choose_precision(self) -> None:
        chosen, reason = precision.choice(self._model)
        # The ranks of a group get each other's tensors as they are.
        self._guessed = group.all_well(chosen is not None, next(self._model.parameters()).device)
        self.peer_dtype = chosen if self._guessed else None
        if chosen is not None and not self._guessed:
            reason = "fp32, as the model: not all of this peer's group multiply bf16 fast"
        if self.needs_peers:
            logger.info(f"codistillation: the peers run in {reason} (--codistill-peer-dtype auto)")

    def _widen(self, reason: str) -> None:
        """The peers' chosen precision does not suit this model: from now on they have the model's."""
        logger.warning(
            f"codistillation: this model cannot run in bf16 ({reason}), so the peers run in fp32, as the model "
            "(--codistill-peer-dtype auto)"
        )
        self._guessed, self.peer_dtype = False, None
        for model in [*self.frozen, *(held.model for held in self._held.values())]:
            freeze(model, None, _dtype_of(self._model))

    def _freeze(self) -> None:
        for teacher in self.frozen:
            freeze(teacher, next(self._model.parameters()).device, self.peer_dtype, _dtype_of(self._model))

    def checkpointed(self) -> None:
        """A checkpoint is being written. Only the one before it is sure to be whole, should I be killed now."""
        self._checkpoints = (self._checkpoints[1], (self._update + 1) if self._update is not None else 0)

    def teaching(self, update: int) -> Optional[Teaching]:
        """Who teaches in this update (0, 1, …), or None: α is 0, nobody can, or it is not one of `every` so many.

        Exchanges first, when that is due.

        Asked again for the same update (micro-batches, a re-run), it exchanges nothing again.
        """
        if update != self._update:
            first, self._update = self._update is None, update
            if self.exchange is not None:
                self._exchange_if_due(update, first)
        alpha = self.schedule.at(self.epoch, update)
        if alpha == 0 or update % self.every:
            return None
        if not self.needs_peers:
            return Teaching(alpha)
        widen = self._widen if self._guessed else None
        if self.frozen:
            names = [getattr(model, "codistill_name", "a teacher") for model in self.frozen]
            return Teaching(alpha, self.frozen, names=names, widen=widen)
        fresh = {peer: held for peer, held in self._held.items() if self._may_teach(held, update)}
        if not fresh:
            return None
        ages = [update - held.manifest.update for held in fresh.values()]
        models = [held.model for held in fresh.values()]
        return Teaching(alpha, models, sum(ages) / len(ages), [f"peer {peer}" for peer in fresh], widen)

    def drain(self, seconds: float) -> None:
        """Wait for what is being published, but no longer than `seconds`; nothing new is begun."""
        if self._courier is not None:
            self._courier.drain(seconds)

    @property
    def may_be_complete(self) -> bool:
        """Training has begun, and has come to --max-update, if there is one."""
        return self._update is not None and (self.updates is None or self._update + 1 >= self.updates)

    def end(self, completed: bool) -> None:
        """Training is over: publish the last weights, so that a slower peer still has a teacher, and leave."""
        if self._left or self.exchange is None or not self._leads:
            return
        self._left = True
        if self._courier is None:
            with contextlib.suppress(OSError):
                self._mine.ask(self.exchange.leave, seconds=1.0)
            self._mine.stop()
            return
        self._courier.totals.updates = self._update + 1 - self._started
        publish_last = lambda: self._publish(self._update + 1, done=True) if completed else None  # noqa: E731
        self._courier.end("ended" if completed else "stopped", publish_last)

    # The exchange. Every rank of a group goes through it; only rank 0 has a courier.

    def _begin(self, update: int) -> None:
        self._checkpoints = (update, update)  # what I resumed from is there
        self._started = update
        group.by_rank_0(lambda: self._begin_exchange(update))
        self._meeting = Meeting(self.exchange, self._courier, self._teachers, self.sleep)
        if self.pull:
            self._pull = Pull(self.pull, self.peer, self._teachers, self._wire, lambda: self.masters())

    def _begin_exchange(self, update: int) -> None:
        architecture = fingerprint(self._model)
        past = self._ask_mine(self._past, update, architecture)
        self._courier = Courier(
            self.exchange, self._teachers, architecture, tensors_of(self._model), self._wire,
            self.in_background and not self.lockstep, self.updates, self.clock, self._mine,
        )  # fmt: skip
        self._courier.start()
        self._warn_of_options(update, past)

    def _past(self, update: int, architecture: str) -> Optional[Manifest]:
        """Begin at `update`; my last snapshot, of an earlier life, if there is one."""
        past = None
        with contextlib.suppress(BadSnapshot):
            past = self.exchange.newest(self.peer) if update else None
        self.exchange.begin(update, architecture, structure(self._model))
        return past

    def _warn_of_options(self, update: int, past: Optional[Manifest]) -> None:
        """Of what was hardly meant. It is said, and changes nothing."""
        if self.pull and not self.shared_init and update == 0:
            logger.warning(
                "codistillation: --codistill-pull averages weights, which helps only peers of one start: if they do not begin "
                "from one checkpoint, did you forget --codistill-init shared?"
            )
        values = {"interval": self.interval, "every": self.every, "burn-in": self.schedule.burn_in}
        for name, value in values.items() if self.updates else ():
            if value >= self.updates:
                logger.warning(
                    f"codistillation: --codistill-{name} is {value}, which is not below --max-update {self.updates}, so this "
                    f"peer will learn nothing from the others; it must be far below, such as {max(1, self.updates // 10)}"
                )
        with contextlib.suppress(Exception):  # an older version's manifest, or one that was tampered with
            change = self.schedule.change_from(past.options, self.epoch, update) if past is not None else None
            if change is not None:
                logger.warning(f"codistillation: since this run's snapshot of update {past.update}: {change}")

    def _ask_mine(self, work: Callable, *args: Any) -> Any:
        """Before training: what `work`, on my own folder, gives. Raises ValueError where the storage does not answer."""
        if not self._mine.start():
            return work(*args)
        try:
            return self._mine.ask(work, *args, seconds=_ANSWER)
        except TimeoutError:
            raise ValueError(
                f"codistill_dir must be storage that answers, but {self.exchange.store} has not answered for {_ANSWER:g} s; "
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
            self._courier.totals.visible_s += time.perf_counter() - start - (self._asked_for_seconds() - asked_for)
            if first:
                self._courier.watch()

    def _exchange(self, update: int, first: bool) -> None:
        begins = first and update == 0 and self.shared_init
        if begins and self.peer != 0:
            begin_with(self._model, self._first_of_peer_0(), self.masters)
        if self._leads:
            try:
                self._show(update, first)
            except Exception as error:  # the other ranks wait for me
                logger.warning(f"codistillation: at update {update} nothing was published: {error}; training goes on")
        if begins and self.peer == 0:  # as the others read it: rounded on the way
            mine = {name: as_sent(tensor, self._wire) for name, tensor in tensors_of(self._model).items()}
            begin_with(self._model, mine, self.masters)
        if self._pull is not None and self._leads:
            self._pull.note(self._model)
        if first and self.wait:
            self._meeting.await_first_snapshots(self.wait)
        self._due = list(self._teachers)
        if not self.lockstep:
            self._reload(first)
        # In lockstep a run resumed between two exchanges goes back to what was held there.
        elif update >= self.interval:
            self._meeting.meet(update - update % self.interval, self.wait or LOCKSTEP_WAIT)
            self._reload(True, update - update % self.interval)

    def _first_of_peer_0(self) -> Optional[Weights]:
        """What every peer begins with, on rank 0: the first snapshot of peer 0, or its newest where that is gone.

        Raises ValueError, on every rank, where none comes."""
        found: List[Tuple[Manifest, Weights]] = []
        seconds, reason = self.wait or LOCKSTEP_WAIT, []

        def ready() -> bool:
            try:
                found.extend(self._ask_mine(self._read_first))
            except Exception as error:
                reason[:] = [f" (the last look: {plain(str(error))})"]
            return bool(found)

        if not self._meeting.until(ready, seconds):
            raise ValueError(
                f"codistill_init shared needs the first snapshot of peer 0, but none has come to {self.exchange.store} within "
                f"{seconds:g} s{''.join(reason)}; does peer 0 run, and see this directory? --codistill-wait sets the time."
            )
        if not found:
            return None
        logger.info(f"codistillation: begins with the weights of peer 0 as of its update {found[0][0].update}")
        return found[0][1]

    def _read_first(self) -> List[Tuple[Manifest, Weights]]:
        manifest = self.exchange.at(0, 0) or self.exchange.newest(0)
        if manifest is None:
            return []
        weights = self.exchange.fetch(0, manifest, self._courier.fingerprint, tensors_of(self._model))
        return [] if weights is None else [(manifest, weights)]

    def _show(self, update: int, first: bool) -> None:
        """To the others: where I am, and my weights."""
        now = time.monotonic()
        seconds, self._exchanged = None if first else now - self._exchanged, now
        self._courier.at(update, {peer: held.manifest.update for peer, held in self._held.items()}, seconds)
        if update % self.interval == 0:
            self._publish(update, done=False)

    def _publish(self, update: int, done: bool) -> None:
        needed_from = self._needed_from if self.lockstep else None
        self._courier.publish(
            tensors_of(self._model), update, needed_from, epoch=self.epoch, fingerprint=self._courier.fingerprint,
            model=self.model_config, time=self.clock(), valid_loss=self.valid_loss,
            resumes_from=self._checkpoints[0], done=done, options=self.schedule.options(),
        )  # fmt: skip

    def _needed_from(self) -> int:
        """Of my snapshots, the earliest that a learner in lockstep may still ask for, while others would wait for it."""
        learners, patience = learners_of(self.peer, self.edges), max(self.wait or LOCKSTEP_WAIT, SILENT_SECONDS)
        return self.exchange.needed_from(learners, self.interval, patience)

    def _reload(self, look: bool = False, update: Optional[int] = None) -> None:
        """Put what the courier has ready into the peers, on every rank. `look`: read now what is there, of `update`."""
        if self._due and (look or not self.in_background):
            self._meeting.read(self._due, update, (self.wait or LOCKSTEP_WAIT) if self.lockstep else _READ)
        news: List[Tuple[int, Manifest, Weights]] = []
        if self._leads:
            for teacher in self._due:
                found = self._courier.take(teacher)
                if found is not None:
                    news.append((teacher, *found))
            self._courier.warn_of_silent(self._due, self._update)
        shared = group.share([(peer, manifest) for peer, manifest, _ in news])
        for peer, manifest in shared:
            self._take(peer, manifest, next((weights for p, _, weights in news if p == peer), None))
            self._due.remove(peer)
        # In lockstep what is only read again, since this run was resumed, has pulled already.
        if shared and self._pull is not None and (not self.lockstep or self._update % self.interval == 0):
            held = {peer for peer, held in self._held.items() if self._may_teach(held, self._update)}
            self._pull.to(self._model, self._update, {peer: weights for peer, _, weights in news if peer in held})
        if news:
            self._courier.holds({peer: held.manifest.update for peer, held in self._held.items()})

    def _take(self, peer: int, manifest: Manifest, weights: Optional[Weights]) -> None:
        """Put a snapshot into the peer's model; ranks other than 0 get the tensors from rank 0.

        What fails on one rank, for want of memory, say, costs the peer's teaching on all."""
        start, reason = time.perf_counter(), "another rank of this peer's group could not"
        try:
            model = self._filled(peer, weights)
        except Exception as error:
            model, reason = None, f"{type(error).__name__}: {error}"  # and not the error, whose frames hold the memory
        if not group.all_well(model is not None, next(self._model.parameters()).device):
            self._held.pop(peer, None)
            logger.warning(
                f"codistillation: peer {peer}: its snapshot of update {manifest.update} could not be loaded ({reason}); "
                "training goes on without it until its next one"
            )
            return
        if group.is_grouped():
            for tensor in tensors_of(model).values():
                dist.broadcast(tensor, src=0)
        self._held[peer] = _Held(model, manifest)
        if self._leads:
            self._courier.totals.copy_s += time.perf_counter() - start
        logger.info(f"codistillation: learning from peer {peer} as of its update {manifest.update}")

    def _filled(self, peer: int, weights: Optional[Weights]) -> nn.Module:
        held = self._held.get(peer)
        model = held.model if held else replica(self._model, self.peer_dtype)
        if weights is not None:
            load(model, weights)
        return model

    # Small questions.

    @property
    def _wire(self) -> Optional[torch.dtype]:
        return self.wire_dtype or (torch.bfloat16 if _dtype_of(self._model) == torch.float32 else None)

    def _asked_for_seconds(self) -> float:
        """Copying weights, and waiting where that was asked for: not counted as visible."""
        return self._courier.totals.copy_s + self._courier.totals.waited_s if self._leads else 0.0

    @property
    def _leads(self) -> bool:
        return group.leads()

    @property
    def _teachers(self) -> List[int]:
        return teachers_of(self.peer, self.edges)

    def _may_teach(self, held: _Held, update: int) -> bool:
        return self.max_staleness is None or update - held.manifest.update <= self.max_staleness


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _cast(value: Any, dtype: Optional[torch.dtype]) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
