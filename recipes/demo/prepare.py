"""The demo's data: corpus, joint pieces and fairseq's binary form, in DIR/raw, DIR/pieces, DIR/subwords.model, DIR/bin.

DIR appears only when all of it is there, so a run that was interrupted starts again and a second run does nothing.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data_prep"))

import grammar_corpus
import parallel_text
from options import user_path

LANGUAGES = ("en", "de")
SPLITS = ("train", "valid", "test")


def build(folder: Path, sizes: dict[str, int], vocab: int, seed: int) -> None:
    """Everything below `folder`; the pieces are learned from the training part alone."""
    grammar_corpus.write_corpus(folder / "raw", sizes, seed)
    texts = {f"{split}.{lang}": folder / "raw" / f"{split}.{lang}" for split in SPLITS for lang in LANGUAGES}
    lines = {name: parallel_text.read_lines(path) for name, path in texts.items()}
    training = [lines[f"train.{lang}"] for lang in LANGUAGES]
    model = parallel_text.train_subwords(training, folder / "subwords.model", vocab, "unigram")
    for name in lines:
        parallel_text.write_lines(folder / "pieces" / name, parallel_text.encode(model, lines[name]))
    parallel_text.binarise(folder / "pieces", folder / "bin", *LANGUAGES, {split: [split] for split in SPLITS})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=user_path, required=True)
    parser.add_argument("--train-pairs", type=grammar_corpus.positive, default=4000)
    parser.add_argument("--test-pairs", type=grammar_corpus.positive, default=500)
    parser.add_argument("--vocab", type=grammar_corpus.positive, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sizes = {"train": args.train_pairs, "valid": 500, "test": args.test_pairs}
    settings = {"pairs": sizes, "vocab": args.vocab, "seed": args.seed}
    stamp = args.out / "settings.json"
    if stamp.is_file():
        made_with = json.loads(stamp.read_text(encoding="utf-8"))
        if made_with != settings:
            parser.error(f"{args.out} was made with {made_with}, not with {settings}; give another folder or delete it")
        print(f"{args.out}: was ready")
        return 0
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        build(part, sizes, args.vocab, args.seed)
    except (ValueError, RuntimeError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    (part / "settings.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    part.replace(args.out)
    counts = " / ".join(str(sizes[split]) for split in SPLITS)
    print(f"{args.out}: {counts} pairs ({' / '.join(SPLITS)}), {args.vocab} joint pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
