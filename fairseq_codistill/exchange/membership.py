"""One peer's membership in a run: agreement with the other peers, the claim of an index, the heartbeat, and the run's id.

A run has a random id in run.json. A peer that begins at update 0 where it has a past, and finds nobody training, begins a
new run under another id; nobody learns from what lies there of the old one. All live peers follow what run.json says, so that
two that begin at the same moment end with one id.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from dataclasses import replace
from typing import Any, Callable, List, Optional

from .liveness import FINAL_STATES, SILENT_SECONDS, Liveness, folder_of, host_name
from .manifest import FORMAT, MANIFEST_LIMIT, BadSnapshot, Heartbeat, Manifest
from .run import Run, in_words, other_making, other_setting
from .stores import two_peers

logger = logging.getLogger(__name__)

_RUN_LOOKS = 5  # tenths of a second
_OWN_RUN = "did you forget to give this run a --codistill-dir of its own, or"


class IndexTaken(ValueError):
    """Another process has this peer's index, so this one publishes nothing more."""


class Membership:
    """Of `peer` in the run that lies in `store`. `restarted`: this process goes on in a running run, even from update 0."""

    def __init__(self, store: Any, peer: int, sleep: Callable[[float], None], restarted: bool) -> None:
        self.store, self.peer, self.folder = store, peer, folder_of(peer)
        self.liveness = Liveness(store, sleep)
        self.run_id: Optional[str] = None
        self.start_id = secrets.token_hex(8)  # of this start of the process
        self.taken: Optional[str] = None  # which process has taken this peer's index
        self._sleep, self._restarted = sleep, restarted
        self._joined: Optional[Run] = None  # what this peer was started with
        self._claimed = False
        self._changed = False  # whether this peer has changed what the run agrees on
        self._before: Optional[str] = None  # the process that had this index before
        self._state: Optional[str] = None  # as of the last heartbeat

    @property
    def _own(self) -> Run:
        assert self._joined is not None, "join comes first"
        return self._joined

    def join(self, run: Run) -> None:
        """Agree on `run`, and claim this peer's index. Raises ValueError, in one sentence; OSError."""
        self._joined = run
        self._agree()
        locked = self.store.claim(self.folder)
        self._claimed = True
        self._watch_for_another(locked)
        self._agree()  # somebody may have changed it meanwhile

    def appear(self, state: str = "waiting") -> None:
        """The first heartbeat, or the last one of a peer that never trained. Raises OSError, IndexTaken."""
        self.beat(Heartbeat(self.start_id, 0 if state == "waiting" else 1, state, host_name(), os.getpid(), time.time()))

    def check_seeds(self) -> None:
        """Raises ValueError where a live peer of this run has the same seed. Each writes its own before it reads others'."""
        seed = self._own.seed
        same = lambda found: found is not None and found.seed == seed and found.run == self.run_id  # noqa: E731
        alive = None if seed is None else self.liveness.find_alive(self._peers(self._own), same)
        if alive is not None:
            raise ValueError(
                f"Peers must have different seeds, since equal ones make equal models, which teach each other nothing, but "
                f"peer {alive} and this peer {self.peer} have --seed {seed}; did you forget to give each its own, far apart?"
            )

    def begin(self) -> None:
        """Training begins: is it still the run that was joined? Raises ValueError."""
        theirs = self._read_run() if self._joined is not None else None
        if theirs is not None:
            label = other_making(self._own, theirs) or other_setting(self._own, theirs)
            if label is not None:
                raise ValueError(f"{self._differs(label, theirs)}; {_OWN_RUN} to stop all peers first?")
            self.run_id = theirs.id
            self.check_seeds()

    def is_new_run(self, past: Optional[Manifest]) -> bool:
        """Whether this peer, at update 0, begins another run: it has a past here, or has changed the run, and nobody trains."""
        if self._joined is None or self._restarted or (past is None and not self._changed):
            return False
        if past is not None and None not in (past.run, self.run_id) and past.run != self.run_id:
            return False  # somebody has begun it already
        trains = lambda found: found is not None and found.state == "training" and found.run == self.run_id  # noqa: E731
        return self.liveness.find_alive(self._peers(self._own), trains) is None

    def begin_new_run(self) -> None:
        """Raises OSError."""
        run = self._own.renewed()
        self.store.write("run.json", run.to_json())
        self.run_id = run.id
        logger.info(f"codistillation: nobody trains in {self.store}, so a new run begins there; what is older teaches nobody")

    def follow(self) -> None:
        """Follow whoever has begun a new run."""
        theirs = self._read_run() if self._joined is not None else None
        self.run_id = theirs.id if theirs is not None and theirs.id is not None else self.run_id

    def check_index(self) -> None:
        """Raises IndexTaken where another process has this peer's index: it took this one for dead while it was paused, and
        there were no locks to show otherwise."""
        if self._joined is None:
            return
        found = None if self.taken else self._heartbeat_or_none()
        if found is not None and found.start_id not in (self.start_id, self._before):
            self.taken = f"process {found.pid} on {found.host}"
        if self.taken:
            raise IndexTaken(
                f"{self.folder} in {self.store} now belongs to {self.taken}, which found this peer silent; this one publishes "
                "nothing more"
            )

    def beat(self, heartbeat: Heartbeat) -> None:
        """Write the heartbeat. Raises OSError, IndexTaken."""
        self.check_index()
        self.follow()
        told = replace(heartbeat, start_id=self.start_id, run=self.run_id, seed=self._joined.seed if self._joined else None)
        self.store.write(f"{self.folder}/alive.json", told.to_json())
        self._state = heartbeat.state

    def leave(self) -> None:
        """Give the index back. Does not raise."""
        if self._state == "waiting":  # nobody else writes the last heartbeat of a peer that never trained
            with contextlib.suppress(OSError, ValueError):
                self.appear("stopped")
        self._state = None
        if self._claimed:
            self._claimed = False
            self.store.release(self.folder)

    def heartbeat(self, peer: int) -> Optional[Heartbeat]:
        """The last heartbeat of `peer`, None before its first. Raises BadSnapshot."""
        data = self.store.read(f"{folder_of(peer)}/alive.json", MANIFEST_LIMIT)
        return None if data is None else Heartbeat.from_json(data)

    def _agree(self) -> None:
        """On what run.json says: it is written if missing, and changed if no other peer is alive."""
        theirs = self._standing_run()
        label = other_making(self._own, theirs)
        if label is not None:
            raise ValueError(f"{self._differs(label, theirs)}; {_OWN_RUN} to preprocess all peers' data with one dictionary?")
        if other_setting(self._own, theirs) is not None:
            alive = self.liveness.find_alive(self._peers(self._own, theirs), lambda found: True)
            theirs = self._standing_run()  # a live peer may just have changed it in the same way
            label = other_setting(self._own, theirs)
            if label is not None and alive is not None:
                raise ValueError(f"{self._differs(label, theirs)}, and peer {alive} runs; {_OWN_RUN} to stop all peers first?")
            if label is not None:
                theirs = replace(self._own, id=theirs.id)
                self.store.write("run.json", theirs.to_json())
                self._changed = True
                logger.info(f"codistillation: nobody else runs in {self.store}, which is now for {in_words(theirs)}")
        self.run_id = theirs.id

    def _differs(self, label: str, theirs: Run) -> str:
        return (
            f"All peers of a run must have the same {label}, but {self.store} was begun with {in_words(theirs)} and this peer "
            f"has {in_words(self._own)}"
        )

    def _standing_run(self) -> Run:
        """What run.json says; this peer's own run if there was none. Raises ValueError, OSError."""
        reason = ""
        if self._read_run() is None:
            self.store.write("run.json", self._own.renewed().to_json(), replace=False)
        for look in range(_RUN_LOOKS):
            try:
                return Run.from_json(self.store.read("run.json", MANIFEST_LIMIT) or b"")
            except BadSnapshot as error:
                reason = str(error)
            if look < _RUN_LOOKS - 1:
                self._sleep(0.1)  # it may just be being written
        raise ValueError(
            f"codistill_dir must be empty or hold a run of format {FORMAT}, but {self.store}/run.json is neither ({reason}); "
            "did you mean another directory?"
        )

    def _read_run(self) -> Optional[Run]:
        with contextlib.suppress(BadSnapshot, OSError):
            data = self.store.read("run.json", MANIFEST_LIMIT)
            return None if data is None else Run.from_json(data)
        return None

    def _peers(self, *runs: Run) -> List[int]:
        """All others that may take part."""
        return [peer for peer in range(max(run.peers for run in runs)) if peer != self.peer]

    def _watch_for_another(self, locked: bool) -> None:
        """Without locks, a peer that claims to be alive must fall silent before its index is taken. No clock is compared.

        A lock proves nothing about another host: some mounts keep their locks to themselves.
        """
        first = self._heartbeat_or_none()
        self._before = first.start_id if first is not None else None
        if first is None or first.state in FINAL_STATES or (locked and first.host == host_name()):
            return
        for _ in range(int(SILENT_SECONDS)):
            self._sleep(1.0)
            if self._heartbeat_or_none() != first:
                raise ValueError(two_peers(self.folder, f"process {first.pid} on {first.host}"))

    def _heartbeat_or_none(self) -> Optional[Heartbeat]:
        try:
            return self.heartbeat(self.peer)
        except BadSnapshot:
            return None
