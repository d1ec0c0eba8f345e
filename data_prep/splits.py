"""Hold sentences out of a corpus that comes without splits, such that none of them leaks into training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Dict, List, Tuple

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
