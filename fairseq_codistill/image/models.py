"""Image classifiers: torchvision's by name, and the small residual networks for small images.

`--arch resnet50` (18, 34, 50, 101, 152, resnext…, wide…) are torchvision's; `--arch resnet20` (8, 14, 20, 32, 44, 56, 110) are
He et al.'s of 2016 for 32 × 32 pixels and less; `--arch image_classifier --image-model efficientnet_b0` is any other of
torchvision. All start untrained. Shapes: B images, C channels, H × W pixels, V classes.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from torch import Tensor, nn

from .. import compat

TORCHVISION_ARCHS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
SMALL_DEPTHS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


# fairseq reads the types of these fields at run time, so this module has no `from __future__ import annotations`.
@dataclass
class ImageClassifierConfig(FairseqDataclass):
    image_model: Optional[str] = _option(None, "resnet20 and the like, or a classifier of torchvision (default: --arch)")
    image_stem: ChoiceEnum(["imagenet", "small"]) = _option(  # type: ignore[valid-type]
        "imagenet", "first layers of torchvision's residual networks; small: 3×3, stride 1, no pooling, for small images"
    )
    image_width: int = _option(16, "channels of the first stage of resnet8 … resnet110")
    image_plain_init: bool = _option(
        False, "residual networks without Goyal et al.'s start: last BatchNorm's γ of each block 0, last layer N(0, 0.01²)"
    )


@register_model("image_classifier", dataclass=ImageClassifierConfig)
class ImageClassifier(BaseFairseqModel):
    """A network from images to logits, as fairseq's criteria expect it."""

    def __init__(self, cfg: ImageClassifierConfig, net: nn.Module) -> None:
        super().__init__()
        self.cfg = cfg
        self.net = net

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageClassifier":
        if not hasattr(task, "classes"):
            raise ValueError("Image classifiers need --task image_classification; did you forget it?")
        cfg = ImageClassifierConfig.from_namespace(cfg)
        return cls(cfg, build_network(cfg, task.cfg.image_channels, len(task.classes)))

    def forward(self, image: Tensor) -> Tensor:
        """image [B, C, H, W] → logits [B, V]."""
        output = self.net(image)
        return output[0] if isinstance(output, tuple) else output  # inception's auxiliary logits are left aside

    def get_targets(self, sample: Dict[str, Tensor], net_output: Tensor) -> Tensor:
        """The labels [B]. A method of its own tells criteria that they may not compute their loss inside the last layer.

        That saves memory with tens of thousands of words, not with classes, and would hide the logits that top-1 counts.
        """
        return sample["target"]


def build_network(cfg: ImageClassifierConfig, channels: int, classes: int) -> nn.Module:
    """The network that `cfg` names. Raises ValueError if there is none of that name, or the options do not fit it."""
    name = cfg.image_model
    if not name:
        raise ValueError("image_model must be given with --arch image_classifier; did you forget --image-model?")
    if cfg.image_width < 1:
        raise ValueError(f"image_width must be at least 1, but is {cfg.image_width} instead.")
    if name in SMALL_DEPTHS:
        small = _small_resnet(SMALL_DEPTHS[name], cfg.image_width, channels, classes)
        return small if cfg.image_plain_init else _as_goyal(small)
    net = _torchvision(name, cfg, classes)
    if channels != 3:
        _replace_first_convolution(net, lambda conv: _like(conv, in_channels=channels))
    if str(cfg.image_stem) == "small":
        if not hasattr(net, "maxpool"):
            raise ValueError(f"image_stem small must go with a residual network, but image_model is {name} instead.")
        _replace_first_convolution(net, lambda conv: _like(conv, kernel_size=3, stride=1, padding=1))
        net.maxpool = nn.Identity()
    return net


def _torchvision(name: str, cfg: ImageClassifierConfig, classes: int) -> nn.Module:
    models = compat.load_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"image_model must be one of {', '.join(SMALL_DEPTHS)} or of torchvision's classifiers "
            f"({', '.join(known)}), but is {name} instead."
        )
    residual = name in TORCHVISION_ARCHS and not cfg.image_plain_init
    net = models.get_model(name, weights=None, num_classes=classes, **({"zero_init_residual": True} if residual else {}))
    if residual:
        nn.init.normal_(net.fc.weight, std=0.01)
        nn.init.zeros_(net.fc.bias)
    return net


def _small_resnet(depth: int, width: int, channels: int, classes: int) -> nn.Sequential:
    """3×3 stem, three stages of n blocks with width, 2·width and 4·width channels; depth = 6n + 2 (He et al. 2016, §4.2).

    Shortcuts that change the shape are 1×1 convolutions with BatchNorm (their option B).
    """
    compat.load_torchvision()
    from torchvision.models.resnet import BasicBlock

    layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    before = width
    for stage in range(3):
        after = width << stage
        for block in range((depth - 2) // 6):
            stride = 2 if stage and not block else 1
            shortcut = None
            if stride != 1 or before != after:
                shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            layers.append(BasicBlock(before, after, stride, shortcut))
            before = after
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _as_goyal(net: nn.Sequential) -> nn.Sequential:
    """Goyal et al. 2017, §5.1: each block starts as its shortcut, and the logits near 0."""
    for module in net.modules():
        if hasattr(module, "bn2"):
            nn.init.zeros_(module.get_parameter("bn2.weight"))
    last = net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return net


def _replace_first_convolution(net: nn.Module, change: Callable[[nn.Conv2d], nn.Conv2d]) -> None:
    name, conv = next((name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, own = name.rpartition(".")
    replaced = change(conv)
    nn.init.kaiming_normal_(replaced.weight, mode="fan_out", nonlinearity="relu")
    setattr(net.get_submodule(parent), own, replaced)


def _like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    settings = dict(
        in_channels=conv.in_channels, out_channels=conv.out_channels, kernel_size=conv.kernel_size, stride=conv.stride,
        padding=conv.padding, bias=conv.bias is not None,
    )  # fmt: skip
    return nn.Conv2d(**{**settings, **changes})


def _register(arch: str) -> None:
    def choose(args: argparse.Namespace) -> None:
        """fairseq calls this for --arch, to fill in what the architecture fixes."""
        given = getattr(args, "image_model", None)
        if given not in (None, arch):
            raise ValueError(
                f"image_model must be left out with --arch {arch}, but is {given}; did you mean --arch image_classifier?"
            )
        args.image_model = arch

    register_model_architecture("image_classifier", arch)(choose)


for _arch in (*TORCHVISION_ARCHS, *SMALL_DEPTHS):
    _register(_arch)
