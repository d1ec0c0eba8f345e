"""Who teaches me now: holds the peers' stale copies, exchanges snapshots when due, and knows each one's age.

Every rank of a data-parallel group has a codistiller; rank 0 alone touches the exchange, and its decision and the
weights that it read are broadcast, so that all ranks hold the same peers at the same update.
Training never stops because of a peer: whatever is wrong with one is a warning, and costs at most its teaching.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .exchange import Exchange, Run
from .schedules import alpha_at
from .snapshot import BadSnapshot, Manifest, Weights, copy_of, fingerprint, tensors_of
from .topology import Edge, learners_of, teachers_of

logger = logging.getLogger(__name__)

LOCKSTEP_WAIT = 600.0  # seconds; in lockstep a peer that is this late is taken for dead
_LOOK_AGAIN = 0.05  # seconds between looks at the exchange while waiting; other machines cannot wake us


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

    def outputs(self, net_input: Dict[str, Any]) -> Iterator[Tuple[nn.Module, Any]]:
        """Each peer with what it predicts for `net_input`; no gradient is recorded."""
        for peer in self.peers:
            dtype = next((p.dtype for p in peer.parameters() if p.is_floating_point()), None)
            with torch.no_grad():
                output = peer(**{name: _cast(value, dtype) for name, value in net_input.items()})
            yield peer, output

    def of(self, part: str) -> Teaching:
        """The same teaching by the sub-models `peer.models[part]`: one language pair of a multilingual model."""
        return Teaching(self.alpha, [peer.models[part] for peer in self.peers], self.staleness)


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
    `needs_peers`: False for the smoothing controls, which teach without a peer; `frozen`: offline teachers.
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
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.epoch = 1
        self.valid_loss: Optional[float] = None
        self._model: Optional[nn.Module] = None
        self._update: Optional[int] = None
        self._held: Dict[int, _Held] = {}
        self._warned: Set[Tuple[int, str]] = set()
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
            _freeze(teacher, next(model.parameters()).device, self.peer_dtype or _dtype_of(model))

    def checkpointed(self) -> None:
        """A checkpoint is being written. Only the one before it is sure to be whole, should I be killed now."""
        self._checkpoints = (self._checkpoints[1], (self._update + 1) if self._update is not None else 0)

    def teaching(self, update: int) -> Optional[Teaching]:
        """Who teaches in this update (0, 1, …), or None: α is 0, or nobody can. Exchanges first, when that is due.

        Asked again for the same update (micro-batches, a re-run), it exchanges nothing again.
        """
        if update != self._update:
            first, self._update = self._update is None, update
            if first and self.exchange is not None:
                self._begin(update)
            if self.exchange is not None and (first or update % self.interval == 0):
                self._exchange(update, first)
        alpha = self.schedule.at(self.epoch, update)
        if alpha == 0:
            return None
        if not self.needs_peers:
            return Teaching(alpha)
        if self.frozen:
            return Teaching(alpha, self.frozen)
        fresh = [held for held in self._held.values() if self._may_teach(held, update)]
        if not fresh:
            return None
        ages = [update - held.manifest.update for held in fresh]
        return Teaching(alpha, [held.model for held in fresh], sum(ages) / len(ages))

    def end(self, completed: bool) -> None:
        """Training is over: publish the last weights, so that a slower peer still has a teacher, and leave."""
        if self._left or self.exchange is None or not self._leads:
            return
        self._left = True
        if completed and self._update is not None:
            self._publish(self._update + 1, done=True)
        self.exchange.leave()

    # The exchange.

    def _begin(self, update: int) -> None:
        self._checkpoints = (update, update)  # what I resumed from is there
        if self._leads:
            self.exchange.begin(update, fingerprint(self._model))

    def _exchange(self, update: int, first: bool) -> None:
        news: List[Tuple[int, Manifest, Weights]] = []
        if self._leads:
            if update % self.interval == 0:
                self._publish(update, done=False)
            if first:
                self._wait_for_company()
            # In lockstep a run resumed between two exchanges goes back to what was held there.
            news = self._collect(update - update % self.interval)
        for peer, manifest in self._share([(peer, manifest) for peer, manifest, _ in news]):
            weights = next((w for p, _, w in news if p == peer), None)
            self._take(peer, manifest, weights)

    def _publish(self, update: int, done: bool) -> None:
        start = time.perf_counter()
        try:
            manifest = self.exchange.publish(
                copy_of(self._model), update, self._needed_from() if self.lockstep else None,
                epoch=self.epoch, fingerprint=fingerprint(self._model), model=self.model_config, time=self.clock(),
                valid_loss=self.valid_loss, resumes_from=self._checkpoints[0], done=done,
            )  # fmt: skip
        except (OSError, BadSnapshot) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            logger.warning(f"codistillation: the snapshot of update {update} was not published: {reason}; training goes on")
            return
        seconds = time.perf_counter() - start
        logger.info(f"codistillation: published update {update}, {manifest.bytes / 1e6:.1f} MB in {seconds:.2f} s")

    def _needed_from(self) -> int:
        """The earliest update at which a learner of mine would resume if it died now: what lockstep must still find."""
        updates = []
        for learner in learners_of(self.peer, self.edges):
            with contextlib.suppress(BadSnapshot):
                manifest = self.exchange.newest(learner)
                updates.append(manifest.resumes_from if manifest else 0)
        return min(updates, default=0) // self.interval * self.interval

    def _wait_for_company(self) -> None:
        for teacher in self._teachers:
            if not self._await(lambda t=teacher: self._look(t, None) is not None, self.wait) and self.wait:
                logger.warning(
                    f"codistillation: peer {teacher} has not appeared in {self.exchange.store} within {self.wait:g} s "
                    "(--codistill-wait); training starts without it"
                )

    def _collect(self, exchange_update: int) -> List[Tuple[int, Manifest, Weights]]:
        """The teachers' new snapshots, verified. A snapshot of update 0 only says "I am here": it has learnt nothing."""
        news = []
        for teacher in self._teachers:
            try:
                manifest = self._choose(teacher, exchange_update)
                if manifest is None and exchange_update > 0:
                    where = self.exchange.store
                    self._warn(teacher, f"it has published nothing in {where} yet; does it run, and see this directory?")
                if manifest is None or manifest.update == 0 or manifest == self._manifest_held(teacher):
                    continue
                weights = self.exchange.fetch(teacher, manifest, fingerprint(self._model), tensors_of(self._model))
                if weights is not None:
                    news.append((teacher, manifest, weights))
                    self._warned = {(peer, what) for peer, what in self._warned if peer != teacher}
            except (BadSnapshot, OSError) as error:
                self._warn(teacher, f"its snapshot is refused: {error}.")
        return news

    def _choose(self, teacher: int, exchange_update: int) -> Optional[Manifest]:
        if not self.lockstep:
            return self.exchange.newest(teacher)
        if exchange_update == 0:
            return None
        found = self._await(lambda: self._look(teacher, exchange_update) is not None, self.wait or LOCKSTEP_WAIT)
        if not found:
            self._warn(teacher, f"lockstep is broken: no snapshot of update {exchange_update} has come in time.")
        return self._look(teacher, exchange_update) or self.exchange.newest(teacher)

    def _look(self, teacher: int, update: Optional[int]) -> Optional[Manifest]:
        """The teacher's snapshot of `update`, or its last if it will make no more; with None, its newest."""
        try:
            manifest = self.exchange.newest(teacher) if update is None else self.exchange.at(teacher, update)
            if manifest is None and update is not None:
                newest = self.exchange.newest(teacher)
                manifest = newest if newest is not None and newest.done and newest.update < update else None
            return manifest
        except BadSnapshot:
            return None

    def _await(self, ready: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() >= deadline:
                return False
            self.sleep(_LOOK_AGAIN)
        return True

    def _share(self, chosen: List[Tuple[int, Manifest]]) -> List[Tuple[int, Manifest]]:
        """Rank 0's choice, on every rank of the group."""
        if not _grouped():
            return chosen
        box = [chosen]  # pickled, but only between the ranks of one peer
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _take(self, peer: int, manifest: Manifest, weights: Optional[Weights]) -> None:
        """Put a snapshot into the peer's model; ranks other than 0 get the tensors from rank 0."""
        held = self._held.get(peer)
        model = held.model if held else _replica(self._model, self.peer_dtype)
        for name, tensor in tensors_of(model).items():
            if weights is not None:
                tensor.copy_(weights[name])
            if _grouped():
                dist.broadcast(tensor, src=0)
        self._held[peer] = _Held(model, manifest)
        logger.info(f"codistillation: learning from peer {peer} as of its update {manifest.update}")

    # Small questions.

    @property
    def _leads(self) -> bool:
        return not _grouped() or dist.get_rank() == 0

    @property
    def _teachers(self) -> List[int]:
        return teachers_of(self.peer, self.edges)

    def _manifest_held(self, peer: int) -> Optional[Manifest]:
        return self._held[peer].manifest if peer in self._held else None

    def _may_teach(self, held: _Held, update: int) -> bool:
        return self.max_staleness is None or update - held.manifest.update <= self.max_staleness

    def _warn(self, peer: int, what: str) -> None:
        if (peer, what) not in self._warned:
            self._warned.add((peer, what))
            logger.warning(f"codistillation: peer {peer}: {what} Training goes on with what it holds.")


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _replica(model: nn.Module, dtype: Optional[torch.dtype]) -> nn.Module:
    """A frozen copy of `model` to hold a peer's weights. It draws no random numbers, so training is not disturbed."""
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for value in list(vars(module).values()):
            # Derived tensors (weight_norm's `weight`) refuse to be copied; they are computed anew in each forward.
            if torch.is_tensor(value) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)  # without its gradient
    return _freeze(copy.deepcopy(model, memo), None, dtype)


def _freeze(model: nn.Module, device: Optional[torch.device], dtype: Optional[torch.dtype]) -> nn.Module:
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _cast(value: Any, dtype: Optional[torch.dtype]) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
