"""fairseq on today's torch and numpy: its checkpoints load again, and loading stays safe.

Since 2.6, `torch.load` refuses every class it was not told of, and fairseq tells it of none: `fairseq-generate`, resuming
and the restore of several processes die on their own checkpoints. The remedy that is often seen
(`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`) lets any file run code. Here exactly the classes that fairseq writes are allowed.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import logging
import re
import sys
import types
import typing
from typing import Any, List

import fairseq
import numpy
import torch


def allow_checkpoint_classes() -> None:
    """Allow the classes of fairseq's checkpoints in `torch.load`; before torch 2.6 there is nothing to do."""
    if loads_safely():
        allowed: List[Any] = checkpoint_classes()
        torch.serialization.add_safe_globals(allowed)


def loads_safely() -> bool:
    """Whether `torch.load` refuses what it was not told of, and can be told of stand-ins by name: since torch 2.6."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 6)


def provide_removed_numpy_names() -> None:
    """`numpy.compat.long`, gone since numpy 2.2: fairseq's language modeling by sentences (`TokenBlockDataset`) asks for it."""
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]


def avoid_broken_fast_path() -> None:
    """Stock fairseq 0.12.2 calls a fused encoder layer in evaluation, without an argument that torch ≥ 2.0 demands.

    `fairseq-generate` dies of it with "Mask Type should be defined". The ordinary path gives the same numbers.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    if fairseq.__version__ == "0.12.2":
        # Each layer sets this attribute to True for itself; a property of the class has the last word.
        TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, value: None)


# Libraries that this package brings in and that log what they do, line by line: to storage, and for each image.
_CHATTY = ("aiobotocore", "aiohttp", "asyncio", "boto3", "botocore", "fsspec", "gcsfs", "PIL", "s3fs", "s3transfer", "urllib3")


def quieten_libraries() -> None:
    """`import fairseq` leaves the root logger at DEBUG with a handler on stderr, so that these would speak up in each script.

    Whoever has set the level of one of these loggers is left alone, as is the root logger.
    """
    for name in _CHATTY:
        library = logging.getLogger(name)
        if library.level == logging.NOTSET:
            library.setLevel(logging.WARNING)


# What torchvision's import asks for where its compiled part cannot be loaded: beside a torch built for CPUs alone.
_TORCHVISION_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: List[Any] = []  # an operator lives as long as the object that declared it


def load_torchvision() -> Any:
    """torchvision, also beside a CPU-only torch, where its compiled part does not load: models and transforms need none of it.

    Raises ValueError, in one sentence, where it is not installed or belongs to another torch.
    """
    for _ in range(1 + len(_TORCHVISION_OPERATORS)):
        try:
            return importlib.import_module("torchvision")
        except ImportError as error:
            raise ValueError(
                "The image task and its models need torchvision, which cannot be imported "
                f"({error}); did you forget pip install 'fairseq-codistill[image]'?"
            ) from error
        except RuntimeError as error:
            _declare_missing_operator(error)
    raise AssertionError("each round declares another operator")


def _declare_missing_operator(error: RuntimeError) -> None:
    """Declare the operator that the import missed, without an implementation, and forget what the import left behind."""
    missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
    schema = _TORCHVISION_OPERATORS.get(missing[1]) if missing else None
    if missing is None or schema is None:
        raise ValueError(
            f"torchvision cannot be imported beside torch {torch.__version__}: {error}; did you forget to install the "
            "version of torchvision that belongs to this torch?"
        ) from error
    # A fragment, because a torchvision whose compiled part does load declares the whole library.
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(missing[1] + schema)
    _libraries.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def checkpoint_classes() -> List[Any]:
    """What fairseq's checkpoints hold besides tensors, numbers, strings and containers. None of it runs code on loading."""
    return [argparse.Namespace, *_fairseq_classes(), *_omegaconf_classes(), *_numpy_stand_ins()]


def _fairseq_classes() -> List[object]:
    from fairseq.data.dictionary import Dictionary  # some tasks keep their dictionary in `task_state`
    from fairseq.distributed.utils import _TensorPlaceholder  # stands for each tensor when rank 0 broadcasts a checkpoint

    return [Dictionary, _TensorPlaceholder]


def _omegaconf_classes() -> List[object]:
    """Checkpoints of fairseq 0.10 hold their configuration as it was, not yet as plain dicts."""
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode, BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode

    nodes = [AnyNode, BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode]
    # Before Python 3.11 typing.Any does not know its own name, so torch must be told.
    anything = typing.Any if hasattr(typing.Any, "__qualname__") else (typing.Any, "typing.Any")
    python = [anything, dict, list, int, float, str, bool, collections.defaultdict, collections.OrderedDict]
    return [DictConfig, ListConfig, ContainerMetadata, Metadata, *nodes, *python]


def _numpy_stand_ins() -> List[object]:
    """Meters that have averaged numpy's numbers or arrays (BLEU's counts, say) store these.

    numpy's own functions must not be allowed: a file can build a dtype of Python objects that looks like one of bytes, so
    that an array of it takes any bytes for addresses of objects. The stand-ins make numbers and text alone.
    """
    names: dict[str, Any] = {"numpy.dtype": _DType, "numpy.ndarray": _Array}
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2, numpy 1
        names.update({f"{module}.scalar": _scalar, f"{module}._reconstruct": _reconstruct})
    return [bytes, *((stand_in, name) for name, stand_in in names.items())]  # b"" is pickled as a call of bytes


class _DType:
    """What a pickle calls numpy.dtype: a code of numbers (b1, i8, f4, c16) or text (S3, U5), and then the order of bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU][0-9]{1,6}", code):
            raise ValueError(f"A checkpoint may hold numpy numbers and texts, but no {code!r}.")
        self.real = numpy.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):  # and nothing else of it
            self.real = self.real.newbyteorder(state[1])


class _Array(numpy.ndarray):
    """What a pickle calls numpy.ndarray, until it has its contents; it is saved as the array of numpy that it is."""

    def __new__(cls, *_: Any) -> _Array:
        return super().__new__(cls, (0,), "u1")

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, fortran, contents = state
        if not isinstance(dtype, _DType):
            raise ValueError("A checkpoint holds an array of numpy without its type.")
        whole: Any = (version, tuple(map(int, shape)), dtype.real, bool(fortran), bytes(contents))
        super().__setstate__(whole)

    def __reduce__(self) -> Any:
        return self.view(numpy.ndarray).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(numpy.ndarray).__reduce_ex__(protocol)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _DType, contents: bytes) -> Any:
    return numpy.frombuffer(contents, dtype.real, count=1)[0]
