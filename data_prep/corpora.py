"""The corpora that can be prepared: where they are published, what their archives hold, and how their splits are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import multi30k
from download import Published
from moses import NO_EMPTY_SIDE, Cleaning, Treatment


@dataclass(frozen=True)
class Part:
    """Two aligned files, or one with two columns. For each language the file names that may hold it, the best first."""

    name: str
    files: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Corpus:
    """How one corpus is made. ``vocab`` is merges for bpe and pieces for sentencepiece."""

    source: str
    target: str
    archives: Tuple[Tuple[Published, ...], ...]  # of each, the first that can be had
    splits: Mapping[str, Tuple[Part, ...]]  # in the file's own order of languages if it has two columns
    vocab: int
    pieces: str
    train: Treatment
    held_out: Treatment
    cleaning: Cleaning = NO_EMPTY_SIDE  # of the training pairs
    cleaned_as_pieces: bool = False  # by their subwords rather than their tokens
    every_nth_to_valid: Optional[int] = None
    by_sentence: Optional[str] = None  # language of which no sentence may be both in train and held out
    expected: Mapping[str, int] = field(default_factory=dict)
    raw_names: Mapping[str, str] = field(default_factory=lambda: {"valid": "valid", "test": "test"})
    about: str = ""

    @property
    def languages(self) -> Tuple[str, str]:
        """Source and target."""
        return self.source, self.target


def _both(*names: str) -> Dict[str, Sequence[str]]:
    """``{}`` stands for the language."""
    return {language: [name.format(language) for name in names] for language in ("de", "en")}


def _ted(name: str) -> Part:
    return Part(name, _both(f"IWSLT14.{name}.de-en.{{}}.xml"))


def _news(name: str, file: Optional[str] = None) -> Part:
    """A WMT test set: plain, as sacrebleu writes it, or as the .sgm of source or reference."""
    return Part(name, _both(f"{name}.{{}}", *(f"{file or name}-{side}.{{}}.sgm" for side in ("src", "ref"))))


_STATMT = ("https://www.statmt.org/", "http://www.statmt.org/")
_DATA_STATMT = ("https://data.statmt.org/", "http://data.statmt.org/")
_WMT_MIRROR = "https://huggingface.co/datasets/wmt/"
# Sizes and digests as tensorflow-datasets and Hugging Face record them.
_DEV = (
    Published(
        "wmt19-dev.tgz",
        tuple(f"{site}wmt19/translation-task/dev.tgz" for site in _DATA_STATMT),
        38654961,
        "7a7deccf82ebb05ba508dba5eb21356492224e8f630ec4f992132b029b4b25e7",
    ),
    Published(
        "wmt19-dev.zip",
        (f"{_WMT_MIRROR}wmt19/resolve/main-zip/translation-task/dev.zip",),
        38714274,
        "d796e363740fdc4261aa6f5a3d2f8223e3adaee7d737b7724863325b8956dfd1",
    ),
)
_TRAINING = (
    (
        Published(
            "training-parallel-europarl-v7.tgz",
            tuple(f"{site}wmt13/training-parallel-europarl-v7.tgz" for site in _STATMT),
            657632379,
            "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
        ),
        Published(
            "training-parallel-europarl-v7.zip",
            (f"{_WMT_MIRROR}wmt13/resolve/main-zip/training-parallel-europarl-v7.zip",),
            658092427,
            "5b2d8b32c2396da739b4e731871c597fcc6e75729becd74619d0712eecf7770e",
        ),
    ),
    (
        Published(
            "training-parallel-commoncrawl.tgz",
            tuple(f"{site}wmt13/training-parallel-commoncrawl.tgz" for site in _STATMT),
            918311367,
            "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
        ),
        Published(
            "training-parallel-commoncrawl.zip",
            (f"{_WMT_MIRROR}wmt13/resolve/main-zip/training-parallel-commoncrawl.zip",),
            918734483,
            "5ffe980072ea29adfd84568d099bea366d9f72772b988e670794ae851b4e5627",
        ),
    ),
    (
        Published(
            "training-parallel-nc-v11.tgz",
            tuple(f"{site}wmt16/translation-task/training-parallel-nc-v11.tgz" for site in _DATA_STATMT),
            75178032,
            "cfe8ab047e05043476e498ee765c98e939c7b7d6d294e856344c84476b619d6a",
        ),
        Published(
            "training-parallel-nc-v11.zip",
            (f"{_WMT_MIRROR}wmt16/resolve/main-zip/translation-task/training-parallel-nc-v11.zip",),
            75185203,
            "8e8b063120c37511a6207b7a4bda9a981efc7df7e1e3c319cfaba774a762af34",
        ),
    ),
)

IWSLT14 = Corpus(
    source="de",
    target="en",
    archives=(
        (
            Published(
                "de-en.tgz",
                (
                    "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",
                    "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",
                    "https://wit3.fbk.eu/archive/2014-01/texts/de/en/de-en.tgz",
                ),
                19982877,  # in public logs of fairseq's script; nobody publishes a sha256
            ),
        ),
    ),
    splits={
        "train": (Part("train", _both("train.tags.de-en.{}")),),
        "test": tuple(map(_ted, ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"))),
    },
    vocab=10000,
    pieces="bpe",
    train=Treatment(tokenise=True, lowercase=True),
    held_out=Treatment(apostrophes=True, tokenise=True, lowercase=True),
    cleaning=Cleaning(1, 175, 1.5),
    every_nth_to_valid=23,
    expected={"train": 160239, "valid": 7283, "test": 6750},
    about="IWSLT'14 German to English, TED talks, as fairseq's prepare-iwslt14.sh makes it",
)

WMT16 = Corpus(
    source="en",
    target="de",
    archives=(*_TRAINING, _DEV),
    splits={
        "train": (
            Part("europarl-v7", _both("europarl-v7.de-en.{}")),
            Part("commoncrawl", _both("commoncrawl.de-en.{}")),
            Part("news-commentary-v11", _both("news-commentary-v11.de-en.{}")),
        ),
        "valid": (_news("newstest2013"),),
        "test": (_news("newstest2014", "newstest2014-deen"),),
    },
    vocab=32000,
    pieces="bpe",
    train=Treatment(normalise=True, tokenise=True, split_hyphens=True),
    held_out=Treatment(apostrophes=True, tokenise=True, split_hyphens=True),
    cleaning=Cleaning(1, 250, 1.5),
    cleaned_as_pieces=True,
    expected={"valid": 3000, "test": 3003},
    about="WMT'16 English to German after Ott et al. 2018: Europarl v7, Common Crawl, News Commentary v11",
)

_NEWS_TO_TRAIN = (
    _news("news-test2008"),
    _news("newssyscomb2009"),
    *(_news(f"newstest{year}") for year in range(2009, 2013)),
    *(_news(f"newstest{year}", f"newstest{year}-deen") for year in range(2015, 2019)),
    *(_news(f"newstest{year}-{direction}") for year in (2019, 2020) for direction in ("deen", "ende")),
)

NEWSTEST = Corpus(
    source="de",
    target="en",
    archives=(
        _DEV,
        *(
            (Published(f"wmt{year}-test.tgz", tuple(f"{site}wmt{year}/translation-task/test.tgz" for site in _DATA_STATMT)),)
            for year in (19, 20)
        ),
    ),
    splits={
        "train": _NEWS_TO_TRAIN,
        "valid": (_news("newstest2013"),),
        "test": (_news("newstest2014", "newstest2014-deen"),),
    },
    vocab=8000,
    pieces="sentencepiece",
    train=Treatment(),
    held_out=Treatment(),
    expected={"train": 30943, "valid": 3000, "test": 3003},
    about="WMT's news test sets 2008 to 2020, German to English: news, but scarce",
)

TATOEBA = Corpus(
    source="de",
    target="en",
    archives=(
        (
            Published(
                "deu-eng.zip", ("https://www.manythings.org/anki/deu-eng.zip", "http://www.manythings.org/anki/deu-eng.zip")
            ),
        ),
    ),
    splits={"all": (Part("tatoeba", {"en de": ["deu.txt", "deu-eng.tsv"]}),)},
    vocab=8000,
    pieces="sentencepiece",
    train=Treatment(),
    held_out=Treatment(),
    by_sentence="en",
    about="Tatoeba German to English, short sentences, split by English sentence",
)

MULTI30K = Corpus(
    source="en",
    target="de",
    archives=tuple(
        (Published(name, tuple(f"{mirror}/{name}" for mirror in multi30k.MIRRORS), None, digest),)
        for name, digest in multi30k.PUBLISHED_SHA256.items()
    ),
    splits={
        "train": (Part("train", _both("train.{}")),),
        "valid": (Part("val", _both("val.{}")),),
        **{f"test{number or ''}": (Part(name, _both(f"{name}.{{}}")),) for number, name in enumerate(multi30k.SPLITS["test"])},
    },
    vocab=2000,
    pieces="sentencepiece",
    train=Treatment(),
    held_out=Treatment(),
    expected={"train": 29000, "valid": 1014, "test": 1000, "test1": 1000, "test2": 461},
    raw_names={"valid": "val", **{f"test{i or ''}": name for i, name in enumerate(multi30k.SPLITS["test"])}},
    about="Multi30k task 1, English to German: captions of pictures",
)

CORPORA: Mapping[str, Corpus] = {
    "iwslt14_de_en": IWSLT14,
    "wmt16_en_de": WMT16,
    "multi30k_en_de": MULTI30K,
    "tatoeba_de_en": TATOEBA,
    "newstest_de_en": NEWSTEST,
}
