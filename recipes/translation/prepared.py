"""Prepared data as data_prep leaves it: which sets there are, and what must be undone before a translation is scored."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

SUBWORDS = {"sentencepiece": "sentencepiece", "bpe": "subword_nmt"}  # in the manifest: what --remove-bpe calls it


@dataclass(frozen=True)
class Prepared:
    """Data in ``folder``; sets are pairs (text in ``raw``, fairseq's subset)."""

    folder: Path
    source: str
    target: str
    subwords: str  # sentencepiece or bpe
    is_tokenised: bool  # by Moses
    is_lowercase: bool
    test_sets: Tuple[Tuple[str, str], ...]
    nll_sets: Tuple[Tuple[str, str], ...]

    def reference(self, name: str) -> Path:
        return self.folder / "raw" / f"{name}.{self.target}"


def read(environ: Mapping[str, str]) -> Prepared:
    """From ``DATA`` and its manifest.json; SOURCE, TARGET, SUBWORDS, TOKENIZER, LOWERCASE and the two …_SETS stand above it.

    Raises ``ValueError`` in one sentence.
    """
    made_by = environ.get("PREPARED_BY", "data_prep/prepare.py")
    folder, manifest = Path(os.path.expanduser(environ.get("DATA", ""))), {}  # the demo's data has none
    if not environ.get("DATA") or not list(folder.glob("bin/dict.*.txt")):
        raise ValueError(f"DATA must be a folder made by {made_by}, but is {environ.get('DATA') or 'not set'}")
    if (folder / "manifest.json").is_file():
        manifest = _manifest(folder / "manifest.json")

    def setting(variable: str, name: str, default: str) -> str:
        return environ.get(variable) or str(manifest.get(name, default))

    tests = [(name, subset) for subset, name in manifest.get("test_sets", {"test": "test"}).items()]
    valids = [(name, subset) for subset, name in manifest.get("valid_sets", {"valid": "valid"}).items()]
    prepared = Prepared(
        folder,
        source=setting("SOURCE", "source_language", ""),
        target=setting("TARGET", "target_language", ""),
        subwords=setting("SUBWORDS", "subwords", "sentencepiece"),
        is_tokenised=setting("TOKENIZER", "tokenizer", "none") == "moses",
        is_lowercase=setting("LOWERCASE", "lowercase", "0").lower() in ("1", "true"),
        test_sets=_sets(environ, "TEST_SETS", tests),
        nll_sets=_sets(environ, "NLL_SETS", valids + tests[:1]),
    )
    _check(prepared)
    return prepared


def _manifest(path: Path) -> Dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but is not ({error}); prepare the data again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, but is not; prepare the data again")
    return found


def _sets(environ: Mapping[str, str], name: str, default: List[Tuple[str, str]]) -> Tuple[Tuple[str, str], ...]:
    """NAME:SUBSET NAME:SUBSET …, the text in DATA/raw and what fairseq-preprocess called it; set but empty means none."""
    if name not in environ:
        return tuple(default)
    pairs = [tuple(word.split(":")) for word in environ[name].split()]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{name} must be NAME:SUBSET and blanks between, such as valid:valid, but has {':'.join(pair)}")
    return tuple((pair[0], pair[1]) for pair in pairs)


def _check(prepared: Prepared) -> None:
    if not (prepared.source and prepared.target):
        raise ValueError(f"SOURCE and TARGET must be languages, but {prepared.folder}/manifest.json does not name them either")
    if prepared.subwords not in SUBWORDS:
        raise ValueError(f"SUBWORDS must be {' or '.join(sorted(SUBWORDS))}, but is {prepared.subwords} instead")
    for name, _ in prepared.test_sets + prepared.nll_sets:
        if not prepared.reference(name).is_file():
            raise ValueError(f"DATA must hold the reference of every set, but {prepared.reference(name)} is not there")
