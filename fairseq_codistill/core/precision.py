"""`--codistill-peer-dtype auto`: bf16 for the peers where the hardware multiplies it fast, else the model's own precision.

The hardware is asked, never timed: the same machine gives the same answer each time, so that lockstep runs stay reproducible
to the bit.
"""

from __future__ import annotations

import os
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn

from .output_layer import first_of_batch

AUTO = "auto"
_CAPABILITY = (8, 0)  # Ampere; older GPUs emulate bf16
# What oneDNN, which computes the products on a CPU, must be allowed to use. Without the variable it uses what is there.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITH_BF16 = ("DEFAULT", "ALL", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512")


def choice(model: nn.Module) -> Tuple[Optional[torch.dtype], str]:
    """(dtype for the peers, None for the model's own; the reason, for the log). Only a float32 model has something to gain."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    if parameter.dtype != torch.float32:
        return None, f"{_name(parameter.dtype)}, as the model"
    fast = fast_bf16(parameter.device)
    if fast is None:
        return None, f"fp32, as the model: no fast bf16 on this {_kind(parameter.device)}"
    return torch.bfloat16, f"bf16, which this {_kind(parameter.device)} multiplies fast ({fast})"


def fast_bf16(device: torch.device) -> Optional[str]:
    """What of `device` multiplies bf16 faster than float32; None if nothing is known to."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fast = torch.version.hip is None and capability >= _CAPABILITY and torch.cuda.is_bf16_supported()
        return f"compute capability {capability[0]}.{capability[1]}" if fast else None
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not _is_allowed():
        return None
    names = {"AMX": "_is_amx_tile_supported", "AVX512_BF16": "_is_avx512_bf16_supported"}
    return next((name for name, question in names.items() if _cpu_has(question)), None)


def failure(peer: nn.Module, net_input: Dict[str, Any]) -> Optional[str]:
    """Why `peer` cannot run in its precision, tried on the first of the batch: some operations know no bf16. None if it can."""
    try:
        with torch.no_grad():
            peer(**first_of_batch(net_input))
    except RuntimeError as error:
        if "out of memory" in str(error):  # the training knows what to do about that
            raise
        return f"{error}".partition("\n")[0]
    return None


def _is_allowed() -> bool:
    limit = next((os.environ[name] for name in _LIMITS if os.environ.get(name)), "DEFAULT")
    return limit.upper().startswith(_WITH_BF16)


def _cpu_has(question: str) -> bool:
    ask = getattr(torch.cpu, question, None)  # not in every torch: then nothing is known of this processor
    return bool(ask is not None and ask())


def _kind(device: torch.device) -> str:
    return {"cuda": "GPU", "cpu": "processor"}.get(device.type, device.type)


def _name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}.get(dtype, str(dtype))
