"""Snapshots on the move: publish, newest, fetch, retain. Format 1, laid out in a store:

    run.json                          which run this is, and what all peers must agree on
    peer0/u000002500.safetensors      weights, written first
    peer0/u000002500.json             their manifest, written next
    peer0/latest.json                 the same manifest, replaced last: a reader believes only what it names
    peer0/alive.json                  a heartbeat every few seconds
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
import time
from dataclasses import replace as replace_fields
from typing import Any, Callable, Dict, Iterable, List, Optional, Union

from .liveness import BEAT, SILENT_SECONDS, folder_of, host_name
from .manifest import MANIFEST_LIMIT, BadSnapshot, Heartbeat, Manifest, file_name, manifest_name
from .membership import IndexTaken, Membership
from .run import Run
from .snapshot import Buffer, Weights, check_manifest, decode, describe
from .stores import two_peers
from .structure import difference

__all__ = ["BEAT", "KEEP", "KEEP_FOR_LEARNERS", "SILENT_SECONDS", "Exchange", "IndexTaken", "Run", "host_name"]

KEEP = 3  # snapshots of a peer: one that is being read, the newest, and one between
KEEP_FOR_LEARNERS = 4 * KEEP  # the most that are kept in lockstep, for learners to resume with
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SNAPSHOT = re.compile(r"u(\d{9})\.safetensors", re.ASCII)


class Exchange:
    """Format 1 in a store, for one peer. `restarted`: this process goes on in a running run, even if it begins at update 0."""

    def __init__(
        self, store: Any, peer: int, sleep: Callable[[float], None] = time.sleep, restarted: bool = False
    ) -> None:
        self.store, self.peer = store, peer
        self.structure: Dict[str, str] = {}  # of this peer's model, see `structure`
        self._membership = Membership(store, peer, sleep, restarted)
        self._kept: List[int] = []  # updates of this peer's snapshots, in the order of writing
        self._torn: Optional[int] = None  # the update of an attempt to publish that failed
        self._last: Optional[Manifest] = None  # what was published since this start
        self._publishing = threading.Lock()

    # Membership.

    def join(self, run: Run) -> None:
        """Agree with the other peers on `run`, and claim this peer's index. Raises ValueError, in one sentence."""
        try:
            self._membership.join(run)
            self._kept = self._left_behind()
            self._making_room(self._membership.appear)
            self._membership.check_seeds()
        except IndexTaken:  # another process came at the same moment
            self.leave()
            raise ValueError(two_peers(self._folder, str(self._membership.taken))) from None
        except OSError as error:
            self.leave()
            raise self._not_writable(error) from None
        except BaseException:
            self.leave()
            raise

    def begin(self, update: int, fingerprint: str, structure: Optional[Dict[str, str]] = None) -> None:
        """Training starts at `update`. Raises ValueError when this peer's folder holds what cannot be this training's past."""
        self.structure = structure or {}
        self._membership.begin()
        past = self._past()
        if past is not None and (past.fingerprint != fingerprint or (past.done and update == 0)):
            what = "has ended" if past.fingerprint == fingerprint else "has another architecture"
            raise ValueError(
                f"codistill_dir {self.store} holds another run, which {what}: peer {self.peer} published update "
                f"{past.update} there and now starts at update {update}; did you forget to give this run a --codistill-dir "
                "of its own, or to resume from its --save-dir?"
            )
        try:
            if update == 0 and self._membership.is_new_run(past):
                self._membership.begin_new_run()
            if past is not None and (update == 0 or self._is_of_another_run(past)):
                self.forget()
            elif past is not None and past.done:  # it goes on after all: a peer in lockstep must wait for this one again
                self.store.write(f"{self._folder}/latest.json", replace_fields(past, done=False).to_json())
        except OSError as error:
            raise self._not_writable(error) from None

    def forget(self) -> None:
        """Remove all snapshots of this peer."""
        for name in self.store.names(self._folder):
            if name == "latest.json" or (name.startswith("u") and name.endswith((".json", ".safetensors"))):
                self.store.remove(f"{self._folder}/{name}")
        self._kept = []

    def leave(self) -> None:
        """Give the index back. Does not raise."""
        self._membership.leave()

    def beat(self, heartbeat: Heartbeat) -> None:
        """Write the heartbeat. Raises OSError, and IndexTaken where another process has this peer's index."""
        self._membership.beat(heartbeat)
        # Another peer may have begun a new run. What is being published just now looks for itself.
        if self._last is not None and self._publishing.acquire(blocking=False):
            try:
                if self._is_of_another_run(self._last):
                    self._tell(self._last)
            finally:
                self._publishing.release()

    def heartbeat(self, peer: int) -> Optional[Heartbeat]:
        """The last heartbeat of `peer`, None before its first. Raises BadSnapshot."""
        return self._membership.heartbeat(peer)

    # Snapshots.

    def publish(
        self, weights: Union[Weights, Buffer], update: int, needed_from: Optional[int] = None, **facts: Any
    ) -> Manifest:
        """Write a snapshot, then its manifest, then forget old ones, but not what learners need from `needed_from` on.

        `facts`: the manifest's other fields. Raises BadSnapshot for weights that are not finite, OSError for a full or
        failing store, IndexTaken where another process has this peer's index; in each case no reader sees anything half done.
        """
        with self._publishing:
            self._membership.check_index()
            buffer = weights if isinstance(weights, Buffer) else Buffer.of(weights)
            manifest = describe(buffer, update, structure=self.structure, **facts)
            # A failed attempt is cleared away by the next one, not at once: a store that timed out may have taken it after all.
            self._remove(self._torn)
            self._torn = update
            self._making_room(lambda: self.store.write(f"{self._folder}/{manifest.file}", buffer.data))
            self._membership.check_index()  # that may have taken long, or this process was paused meanwhile
            self._membership.follow()
            manifest = self._making_room(lambda: self._tell(manifest))
            self._torn = None
            self._kept = [u for u in self._kept if u != update] + [update]
            self._retain(needed_from)
            return manifest

    def newest(self, peer: int) -> Optional[Manifest]:
        """What `peer` published last, None before its first. Raises BadSnapshot."""
        return self._of_this_run(peer, self._manifest(peer, "latest.json"))

    def at(self, peer: int, update: int) -> Optional[Manifest]:
        """What `peer` published at `update`, None if that is not there. Raises BadSnapshot."""
        manifest = self._manifest(peer, manifest_name(update))
        if manifest is not None and manifest.update != update:
            raise BadSnapshot(f"{manifest_name(update)} is the manifest of update {manifest.update}")
        return self._of_this_run(peer, manifest)

    def fetch(self, peer: int, manifest: Manifest, fingerprint: str, expected: Weights) -> Optional[Weights]:
        """The verified tensors of a snapshot; None when it was replaced meanwhile. Raises BadSnapshot."""
        check_manifest(manifest, fingerprint, expected)
        other = difference(self.structure, manifest.structure)
        if other is not None:
            raise BadSnapshot(f"{other}; all peers must have the same model")
        data = self.store.read(f"{folder_of(peer)}/{manifest.file}", manifest.bytes)
        return None if data is None else decode(data, manifest, expected)

    def needed_from(self, learners: Iterable[int], interval: int, patience: float) -> Optional[int]:
        """The earliest update at which a learner would resume if it died now, as a multiple of `interval`; None if nobody
        needs any. One that has ended, or has written no heartbeat for `patience` seconds, needs none."""
        updates = []
        for learner in learners:
            manifest = None
            with contextlib.suppress(BadSnapshot):
                manifest = self.newest(learner)
            is_over = manifest is not None and manifest.done
            if not is_over and self._membership.liveness.silent_for(learner) <= patience:
                updates.append(manifest.resumes_from if manifest else 0)
        return min(updates) // interval * interval if updates else None

    # Small things.

    @property
    def _folder(self) -> str:
        return folder_of(self.peer)

    def _manifest(self, peer: int, name: str) -> Optional[Manifest]:
        data = self.store.read(f"{folder_of(peer)}/{name}", MANIFEST_LIMIT)
        return None if data is None else Manifest.from_json(data)

    def _past(self) -> Optional[Manifest]:
        try:
            return self._manifest(self.peer, "latest.json")
        except BadSnapshot:
            return None

    def _of_this_run(self, peer: int, manifest: Optional[Manifest]) -> Optional[Manifest]:
        if manifest is not None and peer != self.peer and self._is_of_another_run(manifest):
            self._membership.follow()  # this peer may be the one that is behind
            if self._is_of_another_run(manifest):
                raise BadSnapshot("it is of an earlier run")
        return manifest

    def _is_of_another_run(self, manifest: Manifest) -> bool:
        ids = (manifest.run, self._membership.run_id)
        return None not in ids and ids[0] != ids[1]

    def _tell(self, manifest: Manifest) -> Manifest:
        """Write the manifest, under the id of this peer's run."""
        manifest = replace_fields(manifest, run=self._membership.run_id)
        for name in (manifest_name(manifest.update), "latest.json"):
            self.store.write(f"{self._folder}/{name}", manifest.to_json())
        self._last = manifest
        return manifest

    def _left_behind(self) -> List[int]:
        """The updates of the snapshots that were published before this start, the newest last; what a killed publish left is
        removed."""
        self.store.sweep(self._folder)
        found = [_SNAPSHOT.fullmatch(name) for name in self.store.names(self._folder)]
        past = self._past()
        return sorted((int(match[1]) for match in found if match), key=lambda u: (past is not None and u == past.update, u))

    def _making_room(self, action: Callable[[], Any]) -> Any:
        """What `action` returns. On a full disk this peer's older snapshots go, one after another, but never the newest."""
        while True:
            try:
                return action()
            except OSError as error:
                spare = [update for update in self._kept[:-1] if update != self._torn]
                if error.errno not in _FULL or not spare:
                    raise
            self._kept.remove(spare[0])
            self._remove(spare[0])

    def _retain(self, needed_from: Optional[int]) -> None:
        for update in self._kept[:-KEEP]:
            if needed_from is None or update < needed_from or update not in self._kept[-KEEP_FOR_LEARNERS:]:
                self._kept.remove(update)
                self._remove(update)

    def _remove(self, update: Optional[int]) -> None:
        if update is not None:
            for name in (manifest_name(update), file_name(update)):
                self.store.remove(f"{self._folder}/{name}")

    def _not_writable(self, error: OSError) -> ValueError:
        return ValueError(
            f"codistill_dir must be a directory that this peer can write to, but {self.store} is not: "
            f"{error.strerror or error}."
        )
