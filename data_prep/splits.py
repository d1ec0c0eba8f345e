"""Hold sentences out of a corpus that comes without splits, such that none of them leaks into training."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import Callable, Dict, List, Optional, Set, Tuple

from texts import Pair, plain


def split_by_sentence(pairs: Iterable[Pair], key: int, held_out: int) -> Tuple[Dict[str, List[Pair]], int]:
    """train, valid and test, such that the latter two have ``held_out`` distinct sentences in column ``key`` each.

    The sentences are drawn by their digest: which ones does not depend on their order or on the others. No sentence of
    valid or test, of either language, is in another split: pairs that would bring one there are left out. Returns the
    splits and how many pairs were left out. Raises ``ValueError`` if there are not three times ``held_out`` sentences.
    """
    rows = list(pairs)
    keyed = [(plain(row[key]), plain(row[1 - key])) for row in rows]
    sentences = sorted({sentence for sentence, _ in keyed}, key=lambda line: hashlib.sha256(line.encode("utf-8")).digest())
    if len(sentences) < 3 * held_out:
        raise ValueError(f"--held-out must be at most {len(sentences) // 3} for so small a text, but is {held_out} instead")
    home = dict.fromkeys(sentences, "train")
    home.update(dict.fromkeys(sentences[:held_out], "test"))
    home.update(dict.fromkeys(sentences[held_out : 2 * held_out], "valid"))
    # Of two splits that share a translation, the later in this order keeps it.
    other_home: Dict[str, str] = {}
    for split in ("train", "valid", "test"):
        other_home.update((other, split) for sentence, other in keyed if home[sentence] == split)
    splits: Dict[str, List[Pair]] = {"train": [], "valid": [], "test": []}
    for row, (sentence, other) in zip(rows, keyed):
        if other_home[other] == home[sentence]:
            splits[home[sentence]].append(row)
    return splits, len(rows) - sum(map(len, splits.values()))


MOST_CHARACTERS = 1000  # of a sentence that is held out: a model with 1,024 positions, fairseq's default, can translate it


class HeldOut:
    """The rule of ``split_by_sentence`` for a text that is too large for the memory: it is read twice, then judged by pair.

    ``read`` gives the pairs anew at each call; ``sizes`` are distinct source sentences of each split, test before valid,
    as ``{"test": 2000, "valid": 2000}``. What is kept grows with ``sizes`` alone. A pair with an empty or very long side is
    not drawn. Raises ``ValueError`` if there are not
    three times as many sentences as the largest of ``sizes``.
    """

    def __init__(self, read: Callable[[], Iterable[Pair]], sizes: Mapping[str, int]) -> None:
        digests = _smallest((_digest(pair[0]) for pair in read() if _is_fit(pair)), 3 * max(sizes.values()))
        if len(digests) < 3 * max(sizes.values()):
            raise ValueError(
                f"--held-out must be at most {len(digests) // 3} for so small a text, but is {max(sizes.values())} instead"
            )
        self._home: Dict[bytes, str] = {}
        for split, size in sizes.items():
            start = len(self._home)
            self._home.update((digest, split) for digest in digests[start : start + size])
        self._translations: Dict[str, Set[str]] = {split: set() for split in sizes}
        for pair in read():
            split = self._home.get(_digest(pair[0]))
            if split and _is_fit(pair):
                self._translations[split].add(plain(pair[1]))

    def split_of(self, pair: Pair) -> Optional[str]:
        """Where ``pair`` belongs: a split that is held out, or train; None if it would bring there a sentence of another."""
        home, target = self._home.get(_digest(pair[0]), "train"), plain(pair[1])
        if home != "train" and not _is_fit(pair):
            return None
        first = next((split for split, targets in self._translations.items() if target in targets), "train")
        return home if first == home else None


def _is_fit(pair: Pair) -> bool:
    return all(0 < len(plain(line)) <= MOST_CHARACTERS for line in pair)


def _digest(line: str) -> bytes:
    return hashlib.sha256(plain(line).encode("utf-8")).digest()


def _smallest(digests: Iterator[bytes], count: int) -> List[bytes]:
    """The ``count`` smallest distinct ones, sorted; ``heapq.nsmallest`` would count one that comes twice as two."""
    heap: List[int] = []  # negative, so that the largest is on top
    held: Set[int] = set()
    for digest in digests:
        number = -int.from_bytes(digest, "big")
        if number in held or (len(heap) == count and number < heap[0]):
            continue
        held.add(number)
        if len(heap) < count:
            heapq.heappush(heap, number)
        else:
            held.discard(heapq.heappushpop(heap, number))
    return [(-number).to_bytes(32, "big") for number in sorted(heap, reverse=True)]
