"""What fairseq-generate prints, read back: hypotheses, references and log-probabilities in the order of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterable, List, Tuple


def sentences(log: Path, kind: str) -> List[str]:
    """The last field of every ``H-``, ``T-`` or ``P-`` line, by the sentence's number: fairseq takes the longest first."""
    found: Dict[int, str] = {}
    with open(log, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if line.startswith(f"{kind}-"):
                number, _, rest = line.rstrip("\n").partition("\t")
                found[int(number[len(kind) + 1 :])] = rest.rpartition("\t")[2]
    return [found[number] for number in sorted(found)]


def bits_per_token(log: Path) -> Tuple[float, int]:
    """(NLL in bits, tokens) of the references of ``--score-reference``: pieces and end of sentence, each sentence once."""
    # fairseq prints base-2 log-probabilities here.
    probabilities = [float(value) for line in sentences(log, "P") for value in line.split()]
    return -sum(probabilities) / max(len(probabilities), 1), len(probabilities)


def detokenise(lines: Iterable[str], language: str) -> List[str]:
    """Moses tokens back to text, escapes and split hyphens undone; a line that has none stays empty."""
    from sacremoses import MosesDetokenizer

    moses = MosesDetokenizer(language)
    return [moses.detokenize(line.split()) for line in lines]
