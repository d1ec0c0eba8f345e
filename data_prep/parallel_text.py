"""From two aligned text files to fairseq's binary data: read, split into pieces, binarise. Shared by the recipes."""

from __future__ import annotations

import gzip
import hashlib
import io
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import sentencepiece
from sentencepiece import SentencePieceProcessor

PREPROCESS = (sys.executable, "-m", "fairseq_cli.preprocess")  # fairseq-preprocess of this environment, PATH or no PATH
_LONGEST_BYTES = 4192  # of a line that sentencepiece learns from; its own limit, which is written into each model


def find_text(folder: Path, name: str) -> Path:
    """``folder/name`` or ``folder/name.gz``, whichever is there; ``ValueError`` names both if neither is."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"the source folder must hold {name} or {name}.gz, but {folder} has neither")


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text, plain or ``.gz``, without their newlines.

    Only a newline ends a line, as for fairseq and sacrebleu: ``str.splitlines`` would also split at U+2028 and unalign
    the languages. Raises ``ValueError`` where the file is no such text.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        kind = "gzip of UTF-8 text" if path.suffix == ".gz" else "UTF-8 text"
        raise ValueError(f"{path} must be {kind}, but cannot be read as such: {error}") from error
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write UTF-8 text with a newline after every line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 16), b""):
            digest.update(chunk)
    return digest.hexdigest()


def text_sha256(lines: Sequence[str]) -> str:
    """Digest of the text as ``write_lines`` would write it: the same for a file and its gzip."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8")).hexdigest()


def train_subwords(texts: Sequence[Sequence[str]], path: Path, vocab: int, kind: str) -> SentencePieceProcessor:
    """One sentencepiece model for all ``texts`` together, saved at ``path``.

    Deterministic to the byte: every sentence is used and one thread sums the counts; a line that sentencepiece would pass
    over as too long is learned from in parts. Raises ``ValueError``, in one sentence, when the texts are too small for
    ``vocab`` pieces, or unfit otherwise.
    """
    # In memory, because sentencepiece writes the path that it is given into the model.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for text in texts for line in text for part in learnable(line)),
            model_writer=model,
            vocab_size=vocab,
            model_type=kind,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        most, least = re.search(r"<= ?(\d+)", str(error)), re.search(r"\d+ vs (\d+)", str(error))
        if not most and not least:
            is_empty = "sentences_.empty()" in str(error)
            reason = "has no line that is not empty" if is_empty else f"is refused by sentencepiece: {error}"
            raise ValueError(f"the training text must have lines to learn subwords from, but {reason}") from error
        limit = f"at most {most.group(1)}" if most else f"at least {least.group(1)}"
        raise ValueError(f"--vocab must be {limit} for this training text, but is {vocab} instead") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return SentencePieceProcessor(model_proto=model.getvalue())


def learnable(line: str) -> Iterator[str]:
    """The line, or parts of it that sentencepiece does not pass over: cut at blanks, a longer word where it must be."""
    if len(line) * 4 <= _LONGEST_BYTES or len(line.encode("utf-8")) <= _LONGEST_BYTES:
        yield line
        return
    part: list[str] = []
    size = 0
    for word in line.split(" "):
        for start in range(0, len(word), _LONGEST_BYTES // 4):
            piece = word[start : start + _LONGEST_BYTES // 4]
            added = len(piece.encode("utf-8")) + 1
            if part and size + added > _LONGEST_BYTES:
                yield " ".join(part)
                part, size = [], 0
            part.append(piece)
            size += added
    if part:
        yield " ".join(part)


def encode(model: SentencePieceProcessor, lines: Sequence[str]) -> list[str]:
    """Each line as its pieces with blanks between."""
    return [" ".join(pieces) for pieces in model.encode(list(lines), out_type=str)]


def binarise(pieces: Path, out: Path, source: str, target: str, splits: Mapping[str, Sequence[str]], workers: int = 1) -> None:
    """Run ``fairseq-preprocess`` with a joined dictionary on ``pieces/NAME.LANG``, in so many processes.

    ``splits`` maps train, valid and test to file names; fairseq calls the second test set ``test1``, and so on. Its
    output goes to ``out/preprocess.log``. Raises ``RuntimeError`` with the end of its output if it fails.
    """
    command = [*PREPROCESS, "--source-lang", source, "--target-lang", target]
    command += ["--joined-dictionary", "--destdir", str(out), "--workers", str(workers)]
    for split, names in splits.items():
        command += [f"--{split}pref", ",".join(str(pieces / name) for name in names)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError("fairseq-preprocess failed. The end of its output:\n" + result.stdout[-2000:])


def versions() -> dict[str, str]:
    """What made the data, for the manifest."""
    found = {"python": platform.python_version(), "sentencepiece": sentencepiece.__version__}
    for name in ("fairseq-fixed", "fairseq", "sacremoses", "subword-nmt"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
