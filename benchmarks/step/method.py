"""A training step as fairseq makes it, ready to be timed: real task, model, criterion, trainer; random sentences or images.

A method is written as on the command line of measure.py: `cross_entropy`, `rdrop`, or `codistill_ce:N`, optionally with the
distance, the peers' precision and --codistill-every: `codistill_ce:2:mse:bf16:2`. Its peers are real replicas, which the
codistiller holds just as it holds frozen teachers, so that it is taught from the start on and nothing is exchanged.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from fairseq_codistill import hook
from fairseq_codistill.build import TORCH_DTYPES
from fairseq_codistill.config import DTYPES
from fairseq_codistill.core.codistiller import Codistiller
from fairseq_codistill.core.replica import freeze, replica
from fairseq_codistill.core.schedules import AlphaSchedule
from fairseq_codistill.exchange.exchange import Run

PARTS = ("peers", "forward", "backward", "rest")
_TRAINING = "--optimizer adam --lr 1e-4 --clip-norm 1.0 --num-workers 0 --required-batch-size-multiple 1 --seed 1"


@dataclass(frozen=True)
class Setting:
    """What is trained: fairseq's words, V (of text, with the special symbols), and what the machine must have."""

    words: str
    vocabulary: int = 8000
    tokens: int = 2000  # --max-tokens; of images, --batch-size
    length: int = 40  # words in the longest sentence
    needs_gpu: bool = False
    language_model: bool = False
    image_size: int = 0  # pixels of a side; 0: text


def _transformer(width: int, layers: int, ffn: int, heads: int) -> str:
    sides = " ".join(
        f"--{side}-embed-dim {width} --{side}-layers {layers} --{side}-ffn-embed-dim {ffn} --{side}-attention-heads {heads}"
        for side in ("encoder", "decoder")
    )
    return f"--task translation --arch transformer --share-all-embeddings --dropout 0.1 {sides}"


def image_words(arch: str, size: int) -> str:
    normalisation = "--image-mean 0.5,0.5,0.5 --image-std 0.25,0.25,0.25"
    return f"--task image_classification --arch {arch} --augmentation none --image-size {size} {normalisation}"


SETTINGS: Dict[str, Setting] = {
    # The Multi30k recipe's shape, twice as wide.
    "transformer": Setting(_transformer(256, 2, 512, 4)),
    "lstm_lm": Setting(
        "--task language_modeling --sample-break-mode eos --arch lstm_lm --decoder-embed-dim 256 --decoder-hidden-size 256 "
        "--decoder-out-embed-dim 256 --decoder-layers 1 --tokens-per-sample 64 --dropout 0.1",
        language_model=True,
    ),
    "transformer_base": Setting(_transformer(512, 6, 2048, 8) + " --fp16", 32_768, 8000, 60, needs_gpu=True),
    "transformer_big": Setting(_transformer(1024, 6, 4096, 16) + " --fp16", 32_768, 8000, 60, needs_gpu=True),
    "resnet50": Setting(image_words("resnet50", 224) + " --fp16", 1000, 256, needs_gpu=True, image_size=224),
}


class Method(NamedTuple):
    """How it is trained; `peers` counts me, as --codistill-peers does."""

    name: str
    peers: int = 1
    loss: str = "mse"
    dtype: Optional[str] = None
    every: int = 1

    @classmethod
    def parse(cls, text: str) -> Method:
        """Raises ValueError, in one sentence."""
        name, *rest = text.split(":")
        if name in ("cross_entropy", "rdrop") and not rest:
            return cls(name)
        numbers = [word for index, word in enumerate(rest) if index in (0, 3)]
        good = name == "codistill_ce" and 1 <= len(rest) <= 4 and all(word.isdigit() for word in numbers)
        if not good or int(rest[0]) < 2 or rest[2:3] not in ([], *([dtype] for dtype in DTYPES)):
            raise ValueError(
                "A method must be cross_entropy, rdrop or codistill_ce:N[:LOSS[:DTYPE[:EVERY]]] with N of 2 or more peers "
                f"and a DTYPE of {', '.join(DTYPES)}, but is {text!r}."
            )
        return cls(name, int(rest[0]), *rest[1:3], *map(int, rest[3:]))

    def words(self) -> str:
        if self.name == "rdrop":
            return "--criterion label_smoothed_cross_entropy_with_rdrop --rdrop-alpha 5 --label-smoothing 0.1"
        return f"--criterion {self.name}" + (f" --codistill-loss {self.loss}" if self.peers > 1 else "")


def write_data(setting: Setting, folder: Path, sentences: int = 400) -> Path:
    """Random sentences in fairseq's binary form, in which each of the V words occurs, or random images of V classes; what
    is learnt is no matter."""
    if setting.image_size:
        return _write_images(setting, folder)
    draw, words = random.Random(1), setting.vocabulary - 4  # fairseq's own four symbols
    raw, out = folder / "raw", folder / "bin"
    raw.mkdir(parents=True)
    rows = [[draw.randrange(words) for _ in range(draw.randint(10, setting.length))] for _ in range(sentences)]
    rows += [list(range(start, min(start + 30, words))) for start in range(0, words, 30)]
    draw.shuffle(rows)
    for name, part in (("train", rows), ("valid", rows[:4])):
        text = "".join(" ".join(f"w{i}" for i in row) + "\n" for row in part)
        for side in "ab":
            (raw / f"{name}.{side}").write_text(text)
        (raw / name).write_text(text)
    kind = ["--only-source"] if setting.language_model else ["-s", "a", "-t", "b", "--joined-dictionary"]
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--destdir", out, "--workers", "1", *kind]
    command += ["--trainpref", raw / "train", "--validpref", raw / "valid"]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"fairseq-preprocess failed:\n{done.stdout[-2000:]}")
    return out


def _write_images(setting: Setting, folder: Path) -> Path:
    """Noise, at least four batches of it, in folders of classes as torchvision has them."""
    from PIL import Image

    draw, side = random.Random(1), setting.image_size
    for number in range(max(setting.vocabulary, 4 * setting.tokens)):
        place = folder / "train" / f"class{number % setting.vocabulary:04}"
        place.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side)).save(place / f"{number}.png", compress_level=0)
    return folder


class Step:
    """One method on one setting, made ready; `run()` is a training step and gives the seconds of its parts."""

    def __init__(self, setting: Setting, method: Method, data: Path) -> None:
        words = [str(data), *setting.words.split(), *method.words().split(), *_TRAINING.split()]
        words += ["--batch-size" if setting.image_size else "--max-tokens", str(setting.tokens)]
        words += [] if setting.needs_gpu else ["--cpu"]
        args = options.parse_args_and_arch(options.get_training_parser(), words)
        cfg = convert_namespace_to_omegaconf(args)
        utils.set_torch_seed(1)
        task = tasks.setup_task(cfg.task)
        model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
        self._clock, self._gpu = _Clock(setting.needs_gpu), setting.needs_gpu
        self.trainer = Trainer(cfg, task, model, criterion)
        self.peers = self._teach(task, method)
        batches = self.trainer.get_train_iterator(1)
        self._batches = list(batches.next_epoch_itr(shuffle=True))
        self.trainer.begin_epoch(1)
        self._update = 0
        optimizer = self.trainer.optimizer
        self._clock.watch(criterion, "forward", "forward")
        self._clock.watch(optimizer, "backward", "backward")

    def _teach(self, task: Any, method: Method) -> List[torch.nn.Module]:
        peers = []
        for number in range(1, method.peers):
            peer = replica(self.trainer.get_model(), None)
            generator = torch.Generator().manual_seed(number)
            for parameter in peer.parameters():  # another model, not a copy of mine
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.data.add_(noise.to(parameter.device, parameter.dtype))
            freeze(peer, None, TORCH_DTYPES[method.dtype])
            self._clock.watch(peer, "forward", "peers")
            peers.append(peer)
        if peers:
            codistiller = Codistiller(
                peer=0, peers=method.peers, schedule=AlphaSchedule(), peer_dtype=TORCH_DTYPES[method.dtype], every=method.every
            )
            hook.attach(task, codistiller, Run(method.peers, None, None), "train", lambda: peers)
        return peers

    def run_tiny(self) -> None:
        """A step on one sentence: gradients and the optimizer's state come into being."""
        sample = self.trainer.task.dataset("train").collater([self.trainer.task.dataset("train")[0]])
        self.trainer.train_step([sample])

    def run(self) -> Dict[str, float]:
        """Seconds of the whole step and of its PARTS: peers' forward, own forward with loss, backward, and the rest."""
        sample = self._batches[self._update % 4]
        # R-Drop writes into the sample that it is given.
        sample = {**sample, "net_input": dict(sample["net_input"])}
        self._update += 1
        self._clock.seconds.clear()
        with self._clock.part("step"):
            self.trainer.train_step([sample])
        seconds = {name: self._clock.seconds.get(name, 0.0) for name in ("step", "peers", "forward", "backward")}
        seconds["forward"] -= seconds["peers"]
        seconds["rest"] = seconds["step"] - sum(seconds[name] for name in ("peers", "forward", "backward"))
        return seconds


class _Clock:
    """Sums seconds by name; on a GPU each part waits for its kernels, which one that is only timed as a whole need not."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.seconds = gpu, {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def watch(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()
