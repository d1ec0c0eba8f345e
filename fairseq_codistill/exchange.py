"""Snapshots on the move: publish, newest, fetch, retain. Format 1, laid out in a store:

    run.json                          what all peers must agree on
    peer0/u000002500.safetensors      weights, written first
    peer0/u000002500.json             their manifest, written next
    peer0/latest.json                 the same manifest, replaced last: a reader believes only what it names
    peer0/alive.json                  a sign of life every few seconds
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from typing import Callable, Dict, List, Optional, Union

from .manifest import FORMAT, MANIFEST_LIMIT, BadSnapshot, Manifest, Presence, file_name, manifest_name
from .snapshot import Buffer, Weights, check_manifest, decode, describe
from .stores import two_peers

KEEP = 3  # snapshots of a peer: one that is being read, the newest, and one between
BEAT = 5.0  # seconds between two signs of life
_RUN_LOOKS = 5  # tenths of a second
_SILENT = 3  # beats that a peer must miss before its index may be taken over, where the store has no locks


@dataclass(frozen=True)
class Run:
    """What the peers of one run must agree on. The dictionary is the target side's; None where the task has none."""

    peers: int
    dictionary_sha256: Optional[str]
    classes: Optional[int]
    format: int = FORMAT


class Exchange:
    """Format 1 in a store, for one peer."""

    def __init__(self, store, peer: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self.store = store
        self.peer = peer
        self._sleep = sleep
        self._kept: List[int] = []  # my own snapshots' updates, in the order of writing
        self._torn: Optional[int] = None  # the update of an attempt to publish that failed

    def join(self, run: Run) -> None:
        """Agree with the other peers on `run`, and claim my index. Raises ValueError, in one sentence."""
        try:
            self.store.write("run.json", json.dumps(asdict(run), indent=1).encode(), replace=False)
            self._agree(run)
            self._watch_for_another(self.store.claim(self._folder(self.peer)))
            self._kept = self._left_behind()
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> ValueError:
        return ValueError(
            f"codistill_dir must be a directory that this peer can write to, but {self.store} is not: "
            f"{error.strerror or error}."
        )

    def begin(self, update: int, fingerprint: str) -> None:
        """My training starts at `update`. Raises ValueError when my folder holds what cannot be this training's past."""
        try:
            past = self.newest(self.peer)
        except BadSnapshot:
            past = None
        if past is None:
            return
        if past.fingerprint != fingerprint or (past.done and update == 0):
            what = "has ended" if past.fingerprint == fingerprint else "has another architecture"
            raise ValueError(
                f"codistill_dir {self.store} holds another run, which {what}: peer {self.peer} published update "
                f"{past.update} there and now starts at update {update}; did you forget to give this run a --codistill-dir "
                "of its own, or to resume from its --save-dir?"
            )
        if update == 0:
            self.forget()
        elif past.done:  # the training goes on after all: a peer in lockstep must wait for me again
            try:
                self.store.write(f"{self._folder(self.peer)}/latest.json", replace_fields(past, done=False).to_json())
            except OSError as error:
                raise self._not_writable(error) from None

    def forget(self) -> None:
        """Remove all snapshots of mine."""
        folder = self._folder(self.peer)
        for name in self.store.names(folder):
            if name == "latest.json" or (name.startswith("u") and name.endswith((".json", ".safetensors"))):
                self.store.remove(f"{folder}/{name}")
        self._kept = []

    def leave(self) -> None:
        self.store.release(self._folder(self.peer))

    def publish(
        self, weights: Union[Weights, Buffer], update: int, needed_from: Optional[int] = None, **facts
    ) -> Manifest:
        """Write a snapshot, then its manifest, then forget old ones, but none from update `needed_from` on.

        `facts`: the manifest's other fields. Raises BadSnapshot for weights that are not finite, OSError for a full or
        failing store; either way no reader sees anything half done.
        """
        buffer = weights if isinstance(weights, Buffer) else Buffer.of(weights)
        manifest = describe(buffer, update, **facts)
        folder = self._folder(self.peer)
        # A failed attempt is cleared away by the next one, not at once: a store that timed out may have taken it after all.
        self._remove(self._torn)
        self._torn = update
        self.store.write(f"{folder}/{manifest.file}", buffer.data)
        self.store.write(f"{folder}/{manifest_name(update)}", manifest.to_json())
        self.store.write(f"{folder}/latest.json", manifest.to_json())
        self._torn = None
        self._kept = [u for u in self._kept if u != update] + [update]
        self._retain(needed_from)
        return manifest

    def newest(self, peer: int) -> Optional[Manifest]:
        """What `peer` published last, None before its first. Raises BadSnapshot."""
        return self._manifest(peer, "latest.json")

    def at(self, peer: int, update: int) -> Optional[Manifest]:
        """What `peer` published at `update`, None if that is not there. Raises BadSnapshot."""
        manifest = self._manifest(peer, manifest_name(update))
        if manifest is not None and manifest.update != update:
            raise BadSnapshot(f"{manifest_name(update)} is the manifest of update {manifest.update}")
        return manifest

    def fetch(self, peer: int, manifest: Manifest, fingerprint: str, expected: Weights) -> Optional[Weights]:
        """The verified tensors of a snapshot; None when it was replaced meanwhile. Raises BadSnapshot."""
        check_manifest(manifest, fingerprint, expected)
        data = self.store.read(f"{self._folder(peer)}/{manifest.file}", manifest.bytes)
        return None if data is None else decode(data, manifest, expected)

    def beat(self, presence: Presence) -> None:
        """Show that I live. Raises OSError."""
        self.store.write(f"{self._folder(self.peer)}/alive.json", presence.to_json())

    def presence(self, peer: int) -> Optional[Presence]:
        """The last sign of life of `peer`, None before its first. Raises BadSnapshot."""
        data = self.store.read(f"{self._folder(peer)}/alive.json", MANIFEST_LIMIT)
        return None if data is None else Presence.from_json(data)

    def _watch_for_another(self, locked: bool) -> None:
        """Without locks, a peer that claims to live must fall silent before I take its index. No clock is compared.

        A lock proves nothing about another host: some mounts keep their locks to themselves.
        """
        first = self._presence_or_none()
        if first is None or first.state in ("ended", "stopped") or (locked and first.host == host_name()):
            return
        for _ in range(int(_SILENT * BEAT)):
            self._sleep(1.0)
            if self._presence_or_none() != first:
                raise ValueError(two_peers(self._folder(self.peer), f"process {first.pid} on {first.host}"))

    def _presence_or_none(self) -> Optional[Presence]:
        try:
            return self.presence(self.peer)
        except BadSnapshot:
            return None

    def _manifest(self, peer: int, name: str) -> Optional[Manifest]:
        data = self.store.read(f"{self._folder(peer)}/{name}", MANIFEST_LIMIT)
        return None if data is None else Manifest.from_json(data)

    def _agree(self, mine: Run) -> None:
        theirs, reason = None, ""
        for _ in range(_RUN_LOOKS):  # it may just be being written
            try:
                theirs = theirs or self._run()
            except (BadSnapshot, ValueError, RecursionError, KeyError, TypeError) as error:
                reason = f" ({error})" if isinstance(error, BadSnapshot) else ""
            if theirs is None:
                self._sleep(0.1)
        if theirs is None:
            raise ValueError(
                f"codistill_dir must be empty or hold a run of format {FORMAT}, but {self.store}/run.json is neither{reason}; "
                "did you mean another directory?"
            )
        for name, label in _AGREE.items():
            if theirs[name] != asdict(mine)[name]:
                raise ValueError(
                    f"All peers of a run must have the same {label}, but {self.store} was begun with "
                    f"{_words(theirs)} and this peer has {_words(asdict(mine))}; did you forget to give this run a "
                    "--codistill-dir of its own, or to preprocess all peers' data with one dictionary?"
                )

    def _run(self) -> Dict:
        run = json.loads(self.store.read("run.json", MANIFEST_LIMIT) or b"")
        return {name: run[name] for name in asdict(Run(0, None, None))}

    def _left_behind(self) -> List[int]:
        """The updates of the snapshots that I published in an earlier life; what a killed publish left is removed."""
        folder, updates = self._folder(self.peer), []
        for name in self.store.names(folder):
            if name.startswith(".tmp-"):
                self.store.remove(f"{folder}/{name}")
            elif name.endswith(".safetensors") and name[1:10].isdecimal():
                updates.append(int(name[1:10]))
        return updates

    def _retain(self, needed_from: Optional[int]) -> None:
        for update in self._kept[:-KEEP]:
            if needed_from is None or update < needed_from:
                self._kept.remove(update)
                self._remove(update)

    def _remove(self, update: Optional[int]) -> None:
        if update is not None:
            for name in (manifest_name(update), file_name(update)):
                self.store.remove(f"{self._folder(self.peer)}/{name}")

    @staticmethod
    def _folder(peer: int) -> str:
        return f"peer{peer}"


def host_name() -> str:
    return socket.gethostname()[:200]


_AGREE = {
    "format": "snapshot format",
    "peers": "number of peers",
    "classes": "target dictionary",
    "dictionary_sha256": "target dictionary",
}


def _words(run: Dict) -> str:
    sha256 = run["dictionary_sha256"]
    dictionary = "no dictionary" if sha256 is None else f"a dictionary of {run['classes']} symbols (sha256 {str(sha256)[:12]})"
    return f"{run['peers']} peers, {dictionary}, format {run['format']}"
