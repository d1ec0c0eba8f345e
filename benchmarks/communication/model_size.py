"""How large a model is: counted, from fairseq's registry, torchvision, a file of weights, or a number that you give."""

from __future__ import annotations

import functools
import json
import os
from argparse import Namespace
from typing import NamedTuple

# torchvision's resnet50, where torchvision is missing or does not load beside this torch.
RESNET50 = (25_557_032, 53_120 + 53)
VOCABULARY = 32_768  # joined dictionary of WMT'16 En-De, with its four special symbols
NAMES = ("transformer_vaswani_wmt_en_de_big", "resnet50")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of one number; int8's scales add less than 1 %


class Size(NamedTuple):
    """`parameters` are trained, so their gradients are all-reduced; `buffers` are published with them. Numbers, not bytes."""

    name: str
    parameters: int
    buffers: int = 0
    source: str = "as given"

    @property
    def published(self) -> int:
        return self.parameters + self.buffers


@functools.cache
def of_model(name: str, vocabulary: int = VOCABULARY) -> Size:
    """`resnet50`, or an architecture of fairseq's for translation with a joined dictionary. Raises ValueError."""
    return _resnet50() if name == "resnet50" else _translation(name, vocabulary)


def of_file(path: str) -> Size:
    """A safetensors file (all of it counts as parameters), or a checkpoint of fairseq's. Raises ValueError."""
    name = os.path.basename(path)
    try:
        if path.endswith(".safetensors"):
            return Size(name, _numbers_in_safetensors(path), source=f"counted in {name}")
        return Size(name, _numbers_in_checkpoint(path), source=f"counted in {name}")
    except OSError as error:
        raise ValueError(f"--model-file must be a file that can be read, but {path} is not: {error.strerror}.") from None
    except Exception as error:
        # A damaged pickle may raise anything.
        raise ValueError(
            f"--model-file must be a .safetensors file or a fairseq checkpoint, but {path} is neither ({type(error).__name__})."
        ) from None


def _translation(name: str, vocabulary: int) -> Size:
    import torch
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    if name not in ARCH_CONFIG_REGISTRY:
        raise ValueError(f"--model must be resnet50 or an architecture of fairseq's, but is {name!r} instead.")
    words = Dictionary()
    for number in range(vocabulary - len(words)):
        words.add_symbol(f"w{number}")
    args = Namespace(arch=name, share_all_embeddings=True, max_source_positions=1024, max_target_positions=1024)
    ARCH_CONFIG_REGISTRY[name](args)
    try:
        with torch.device("meta"):  # shapes without memory
            model = ARCH_MODEL_REGISTRY[name].build_model(args, Namespace(source_dictionary=words, target_dictionary=words))
    except (AttributeError, TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"--model must be a translation model, but {name} cannot be built as one: {error}.") from None
    return _count(model, f"{name}, V={vocabulary:,}", "counted in fairseq's model")


def _resnet50() -> Size:
    try:
        import torch
        from torchvision.models import resnet50
    except (ImportError, RuntimeError):  # RuntimeError: torchvision's compiled part does not fit this torch
        return Size("resnet50", *RESNET50, source="published for torchvision's model, which is not installed here")
    with torch.device("meta"):
        return _count(resnet50(), "resnet50", "counted in torchvision's model")


def _count(model, name: str, source: str) -> Size:
    kept = set(model.state_dict())  # some buffers are tables that are computed anew, and are never published
    buffers = sum(tensor.numel() for key, tensor in model.named_buffers() if key in kept)
    return Size(name, sum(parameter.numel() for parameter in model.parameters()), buffers, source)


def _numbers_in_safetensors(path: str) -> int:
    with open(path, "rb") as file:  # the header alone: eight bytes of its length, then JSON
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(_product(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _numbers_in_checkpoint(path: str) -> int:
    import torch

    from fairseq_codistill import compat

    compat.allow_checkpoint_classes()
    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    tensors = {(t.data_ptr(), t.shape): t for t in weights.values() if t.numel()}  # tied ones once
    return sum(tensor.numel() for tensor in tensors.values())


def _product(shape) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
