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
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .courier import Courier
from .exchange import Exchange, Run
from .int8 import load
from .manifest import BadSnapshot, Manifest
from .replica import freeze, replica
from .schedules import alpha_at
from .snapshot import Weights, fingerprint, tensors_of
from .topology import Edge, learners_of, teachers_of

logger = logging.getLogger(__name__)

LOCKSTEP_WAIT = 600.0  # seconds; in lockstep a peer that is this late is taken for dead
_LOOK_AGAIN = 0.05  # seconds between looks at the exchange while waiting; other machines cannot wake us
_SLICE = 30.0  # seconds after which waiting ranks hear from rank 0, far below what a process group takes for a hang
_LATE_LOOKS = 10  # looks in an interval for a snapshot that was not there when the exchange was due
_LAST_PUBLISH = 300.0  # seconds to wait for the storage when training has ended


@dataclass(frozen=True)
class AlphaSchedule:
    """The options that decide α; see `schedules`."""

    name: str = "constant"
    alpha: float = 1.0
    gamma: float = 1.1
    step: float = 0.5
    milestones: Sequence[float] = ()
    maximum: Optional[float] = None
    burn_in: int = 0

    def at(self, epoch: int, update: int) -> float:
        return alpha_at(
            self.name, epoch, update, alpha=self.alpha, gamma=self.gamma, step=self.step,
            milestones=self.milestones, maximum=self.maximum, burn_in=self.burn_in,
        )  # fmt: skip


@dataclass(frozen=True)
class Teaching:
    """What a training sample carries to the criterion: α, and the peers to learn from, each frozen and in eval mode.

    Peers run only when their outputs are asked for, one after another; the criterion decides what it keeps of each.
    """

    alpha: float
    peers: Sequence[nn.Module] = ()
    staleness: float = 0.0  # updates, mean over the peers
    names: Sequence[str] = ()  # of the peers, for messages

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
        return Teaching(self.alpha, [peer.models[part] for peer in self.peers], self.staleness, self.names)


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
    controls, which teach without a peer; `frozen`: offline teachers; `every`: of so many updates one is taught.
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
        self._model: Optional[nn.Module] = None
        self._update: Optional[int] = None
        self._started = 0  # my first update in this life
        self._held: Dict[int, _Held] = {}
        self._due: List[int] = []  # teachers of whom nothing new has come since the exchange was due
        self._courier: Optional[Courier] = None  # rank 0's alone
        self._exchanged: Optional[float] = None  # when, by time.monotonic
        self._checkpoints = (0, 0)  # updates of the last checkpoint but one, and of the last
        self._left = False

    # What the hook tells.

    def join(self, run: Run) -> None:
        """Before training: agree with the other peers on the run. Raises ValueError, in one sentence."""
        if self._leads and self.exchange is not None:
            self.exchange.join(run)

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """`model`: the unwrapped one, on its device and in its dtype."""
        self.epoch, self._model = epoch, model
        for teacher in self.frozen:
            freeze(teacher, next(model.parameters()).device, self.peer_dtype, _dtype_of(model))

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
        if self.frozen:
            return Teaching(alpha, self.frozen, names=[getattr(model, "codistill_name", "a teacher") for model in self.frozen])
        fresh = {peer: held for peer, held in self._held.items() if self._may_teach(held, update)}
        if not fresh:
            return None
        ages = [update - held.manifest.update for held in fresh.values()]
        models = [held.model for held in fresh.values()]
        return Teaching(alpha, models, sum(ages) / len(ages), [f"peer {peer}" for peer in fresh])

    def drain(self, seconds: float) -> None:
        """Wait for what is being published, but no longer than `seconds`; nothing new is begun."""
        if self._courier is not None:
            self._courier.drain(seconds)

    def end(self, completed: bool) -> None:
        """Training is over: publish the last weights, so that a slower peer still has a teacher, and leave."""
        if self._left or self.exchange is None or not self._leads:
            return
        self._left = True
        if self._courier is not None:
            self._courier.drain(_LAST_PUBLISH)
            if completed:
                self._publish(self._update + 1, done=True)
                self._courier.drain(_LAST_PUBLISH)
            self._courier.totals.updates = self._update + 1 - self._started
            self._courier.stop("ended" if completed else "stopped")
        self.exchange.leave()

    # The exchange. Every rank of a group goes through it; only rank 0 has a courier.

    def _begin(self, update: int) -> None:
        self._checkpoints = (update, update)  # what I resumed from is there
        self._started = update
        if self._leads:
            architecture = fingerprint(self._model)
            self.exchange.begin(update, architecture)
            wire = self.wire_dtype or (torch.bfloat16 if _dtype_of(self._model) == torch.float32 else None)
            self._courier = Courier(
                self.exchange, self._teachers, architecture, tensors_of(self._model), wire,
                self.in_background and not self.lockstep, self.updates, self.clock,
            )  # fmt: skip
            self._courier.start()

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
        if self._leads:
            now = time.monotonic()
            seconds, self._exchanged = None if first else now - self._exchanged, now
            self._courier.at(update, {peer: held.manifest.update for peer, held in self._held.items()}, seconds)
            if update % self.interval == 0:
                self._publish(update, done=False)
        if first and self.wait:
            self._wait_for_company()
        self._due = list(self._teachers)
        if not self.lockstep:
            self._reload(first)
        # In lockstep a run resumed between two exchanges goes back to what was held there.
        elif update >= self.interval:
            self._meet(update - update % self.interval)
            self._reload(True, update - update % self.interval)

    def _publish(self, update: int, done: bool) -> None:
        needed_from = self._needed_from() if self.lockstep else None
        self._courier.publish(
            tensors_of(self._model), update, needed_from, epoch=self.epoch, fingerprint=self._courier.fingerprint,
            model=self.model_config, time=self.clock(), valid_loss=self.valid_loss,
            resumes_from=self._checkpoints[0], done=done,
        )  # fmt: skip

    def _needed_from(self) -> int:
        """The earliest update at which a learner of mine would resume if it died now: what lockstep must still find."""
        updates = []
        for learner in learners_of(self.peer, self.edges):
            with contextlib.suppress(BadSnapshot):
                manifest = self.exchange.newest(learner)
                updates.append(manifest.resumes_from if manifest else 0)
        return min(updates, default=0) // self.interval * self.interval

    def _reload(self, look: bool = False, update: Optional[int] = None) -> None:
        """Put what the courier has ready into the peers, on every rank. `look`: read now what is there, of `update`."""
        news: List[Tuple[int, Manifest, Weights]] = []
        if self._leads:
            for teacher in self._due:
                if look or not self.in_background:
                    self._courier.look(teacher, update)
                found = self._courier.take(teacher)
                if found is not None:
                    news.append((teacher, *found))
            self._courier.warn_of_silent(self._due, self._update)
        for peer, manifest in self._share([(peer, manifest) for peer, manifest, _ in news]):
            self._take(peer, manifest, next((weights for p, _, weights in news if p == peer), None))
            self._due.remove(peer)

    def _wait_for_company(self) -> None:
        if self._await(lambda: all(self._look(teacher, None) for teacher in self._teachers), self.wait) or not self._leads:
            return
        for teacher in self._teachers:
            if self._look(teacher, None) is None:
                logger.warning(
                    f"codistillation: peer {teacher} has not appeared in {self.exchange.store} within {self.wait:g} s "
                    "(--codistill-wait); training starts without it"
                )

    def _meet(self, update: int) -> None:
        """Lockstep: wait until each teacher has published `update`, or has ended before it."""
        everybody = lambda: all(self._look(teacher, update) for teacher in self._teachers)  # noqa: E731
        if self._await(everybody, self.wait or LOCKSTEP_WAIT) or not self._leads:
            return
        for teacher in self._teachers:
            if self._look(teacher, update) is None:
                self._courier.warn(teacher, f"lockstep is broken: no snapshot of update {update} has come in time.")

    def _look(self, teacher: int, update: Optional[int]) -> Optional[Manifest]:
        """The teacher's snapshot of `update`, or its last if it will make no more; with None, its newest."""
        try:
            manifest = self.exchange.newest(teacher) if update is None else self.exchange.at(teacher, update)
            if manifest is None and update is not None:
                newest = self.exchange.newest(teacher)
                manifest = newest if newest is not None and newest.done and newest.update < update else None
            return manifest
        except (BadSnapshot, OSError):
            return None

    def _await(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Wait until rank 0 finds it `ready`, on all ranks. In slices: a process group takes long silence for a hang."""
        start, deadline = time.monotonic(), time.monotonic() + seconds
        answer = None
        while answer is None:
            slice_end = time.monotonic() + _SLICE
            while self._leads and answer is None and time.monotonic() < slice_end:
                if ready():
                    answer = True
                elif time.monotonic() >= deadline:
                    answer = False
                else:
                    self.sleep(_LOOK_AGAIN)
            answer = self._share(answer)
        if self._leads:
            self._courier.totals.waited_s += time.monotonic() - start
        return answer

    def _share(self, what: Any) -> Any:
        """Rank 0's decision, on every rank of the group."""
        if not _grouped():
            return what
        box = [what]  # pickled, but only between the ranks of one peer
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _take(self, peer: int, manifest: Manifest, weights: Optional[Weights]) -> None:
        """Put a snapshot into the peer's model; ranks other than 0 get the tensors from rank 0."""
        start = time.perf_counter()
        held = self._held.get(peer)
        model = held.model if held else replica(self._model, self.peer_dtype)
        if weights is not None:
            load(model, weights)
        if _grouped():
            for tensor in tensors_of(model).values():
                dist.broadcast(tensor, src=0)
        self._held[peer] = _Held(model, manifest)
        if self._leads:
            self._courier.totals.copy_s += time.perf_counter() - start
        logger.info(f"codistillation: learning from peer {peer} as of its update {manifest.update}")

    # Small questions.

    def _asked_for_seconds(self) -> float:
        """Copying weights, and waiting where that was asked for: not counted as visible."""
        return self._courier.totals.copy_s + self._courier.totals.waited_s if self._leads else 0.0

    @property
    def _leads(self) -> bool:
        return not _grouped() or dist.get_rank() == 0

    @property
    def _teachers(self) -> List[int]:
        return teachers_of(self.peer, self.edges)

    def _may_teach(self, held: _Held, update: int) -> bool:
        return self.max_staleness is None or update - held.manifest.update <= self.max_staleness


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _cast(value: Any, dtype: Optional[torch.dtype]) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
