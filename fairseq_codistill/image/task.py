"""`--task image_classification`: images in folders of classes, with top-1 and top-5 in fairseq's logs.

It knows nothing of codistillation: `cross_entropy`, `codistill_ce` and any other criterion that calls
`model(**sample["net_input"])` work with it. Shapes: B images, V classes.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, register_task
from torch import Tensor, nn

from .. import compat
from . import lr_schedules
from .folder import ImageFolder, check_classes, find_images, measure, part_of, split_folder
from .options import ImageClassificationConfig, channel_values, check, fraction
from .transforms import Pipeline

_COUNTS = ("top1", "top5")
_NOTHING = {"loss": 0.0, "nll_loss": 0.0, "ntokens": 0, "nsentences": 0, "sample_size": 0, "top1": 0, "top5": 0}


@register_task("image_classification", dataclass=ImageClassificationConfig)
class ImageClassificationTask(FairseqTask):
    """Classes and normalisation are those of the training split, and travel in the checkpoint."""

    def __init__(self, cfg: ImageClassificationConfig, **_: Any) -> None:
        super().__init__(cfg)
        check(cfg)
        compat.load_torchvision()  # before anything takes time
        self.state.add_factory("classes", lambda: find_images(split_folder(cfg.data, cfg.train_subset)).classes)
        self.state.add_factory("normalisation", self._measure)
        self._updates_per_epoch: Optional[int] = None
        self._start: Optional[List[Tensor]] = None
        self._distance: Optional[float] = None

    @property
    def classes(self) -> List[str]:
        """The names of the classes, in the order of the model's outputs."""
        return self.state.classes

    @property
    def normalisation(self) -> Tuple[List[float], List[float]]:
        """Mean and standard deviation of each channel: given, or else of the training split."""
        given = channel_values(self.cfg, "image_mean")
        return (given, channel_values(self.cfg, "image_std")) if given else tuple(self.state.normalisation)

    def _measure(self) -> List[List[float]]:
        images = find_images(split_folder(self.cfg.data, self.cfg.train_subset))
        return list(measure(images, self.pipeline(train=False), self.cfg.skip_unreadable_images))

    def pipeline(self, train: bool) -> Pipeline:
        """What is done to an image before the model sees it."""
        cfg = self.cfg
        return Pipeline(
            str(cfg.augmentation), cfg.image_size,
            resize=cfg.image_resize, channels=cfg.image_channels, flip=not cfg.no_image_flip, train=train,
        )  # fmt: skip

    def load_dataset(self, split: str, combine: bool = False, **_: Any) -> None:
        """Find the images of `split`. Raises ValueError if its classes are not those of the training split."""
        folder = split_folder(self.cfg.data, split)
        images = find_images(folder)
        check_classes(self.classes, images, folder, "the training split")
        train = split == self.cfg.train_subset
        self.datasets[split] = ImageFolder(
            part_of(images, fraction(self.cfg)) if train else images,
            self.pipeline(train),
            *self.normalisation,
            shuffle=train,
            skip=self.cfg.skip_unreadable_images,
            keep=self.cfg.image_cache,
        )

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """fairseq's; the random part of images is drawn with its seed, and schedules by epochs are told its length."""
        dataset.seed = kwargs.get("seed", 1)
        batches = super().get_batch_iterator(dataset, *args, **kwargs)
        if dataset is self.datasets.get(self.cfg.train_subset):
            self._updates_per_epoch = self._updates(len(batches))
        return batches

    def _updates(self, batches: int) -> int:
        frequencies = list(self.cfg.update_freq)
        if len(frequencies) > 1:
            return 0  # epochs differ in length, so nothing is told
        if self.cfg.skip_remainder_batch:
            return (batches - 1) // frequencies[0]
        return math.ceil(batches / frequencies[0])

    def build_model(self, cfg: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().build_model(cfg, *args, **kwargs)
        if self.cfg.log_init_distance:
            # Also when a run is resumed: what the seed gives comes before what the checkpoint holds.
            self._start = [p.detach().clone().cpu().float() for p in model.parameters()]
        return model

    def begin_valid_epoch(self, epoch: int, model: nn.Module) -> None:
        super().begin_valid_epoch(epoch, model)
        if self._start is not None:
            self._distance = distance(model, self._start)

    def train_step(
        self,
        sample: Dict[str, Any],
        model: nn.Module,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        *args: Any,
        **kwargs: Any,
    ) -> Tuple[Any, Any, Dict[str, Any]]:
        lr_schedules.tell_updates_per_epoch(optimizer, self._updates_per_epoch)
        with self._counting(sample, model) as counts:
            loss, sample_size, log = super().train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)
        return loss, sample_size, {**log, **counts}

    def valid_step(self, sample: Dict[str, Any], model: nn.Module, criterion: Any, *args: Any, **kwargs: Any) -> Tuple:
        if not sample:  # fairseq-validate, where no image of a batch can be read
            return torch.zeros(()), 0, dict(_NOTHING)
        with self._counting(sample, model) as counts:
            loss, sample_size, log = super().valid_step(sample, model, criterion, *args, **kwargs)
        if self._distance is not None:
            counts["init_distance"] = self._distance * sample["nsentences"]
        return loss, sample_size, {**log, **counts}

    @contextlib.contextmanager
    def _counting(self, sample: Dict[str, Any], model: nn.Module) -> Iterator[Dict[str, Any]]:
        """Inside, the model's first forward of this batch fills the counts: targets that are its first choice, or among five.

        A hook on the model sees the logits that the criterion gets, so that nothing is computed twice and no criterion
        needs to know of it. Peers' models are others, and are not counted.
        """
        counts: Dict[str, Any] = {}

        def count(_: nn.Module, inputs: Any, output: Any) -> None:
            logits_BV = output[0] if isinstance(output, tuple) else output
            self._check_outputs(logits_BV)
            # A criterion may try the model on a part of the batch first.
            if not counts and len(logits_BV) >= len(sample["target"]):
                counts.update(_hits(logits_BV, sample["target"]))

        handle = model.register_forward_hook(count)
        try:
            yield counts
        finally:
            handle.remove()

    def _check_outputs(self, logits_BV: Any) -> None:
        """Raises ValueError if the model's outputs are not one for each class."""
        if not torch.is_tensor(logits_BV) or logits_BV.dim() != 2 or logits_BV.size(1) != len(self.classes):
            shape = tuple(logits_BV.shape) if torch.is_tensor(logits_BV) else type(logits_BV).__name__
            raise ValueError(
                f"The model must give {len(self.classes)} outputs for each image, one for each class of {self.cfg.data}, but "
                f"gives {shape} instead; did you forget that the checkpoint or --arch is for other data?"
            )

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: Any) -> None:
        """The criterion's, and top1 and top5 in percent of the images."""
        super().reduce_metrics(logging_outputs, criterion)
        images = sum(log.get("nsentences", 0) for log in logging_outputs)
        for name in _COUNTS:
            if images and any(name in log for log in logging_outputs):
                hits = sum(log.get(name, 0) for log in logging_outputs)
                metrics.log_scalar(name, 100.0 * hits / images, images, round=2)
        if images and any("init_distance" in log for log in logging_outputs):
            metrics.log_scalar(
                "init_distance", sum(log.get("init_distance", 0) for log in logging_outputs) / images, images, round=4
            )

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    @property
    def target_dictionary(self) -> None:
        """None, as in today's fairseq; stock 0.12.2 would raise."""
        return None


def _hits(logits_BV: Tensor, target_B: Tensor) -> Dict[str, Tensor]:
    best_BK = logits_BV.detach().topk(min(5, logits_BV.size(1)), dim=1).indices
    hits_BK = best_BK[: len(target_B)] == target_B.unsqueeze(1)
    return {"top1": hits_BK[:, 0].sum(), "top5": hits_BK.any(1).sum()}


def distance(model: nn.Module, start: List[Tensor]) -> float:
    """‖θ − θ₀‖₂ over all parameters; BatchNorm's running statistics are none (Sodhani et al., Fig. 1c)."""
    parts = [(p.detach().cpu().float() - p0).square().sum().item() for p, p0 in zip(model.parameters(), start)]
    return math.sqrt(sum(parts))
