"""R-Drop (Liang et al. 2021): two passes with different dropout, and the symmetric KL between their predictions.

    loss = Σ over positions of (mean over both passes of (cross entropy + α · D) + β · (KL(p ‖ q) + KL(q ‖ p)) / 2)

Both passes are one forward of a batch that has each row twice, one behind the other, so that rows stay sorted by length.

Shapes: B rows of a batch, N = B·T positions, V classes. "Passes first": N positions of the first pass, then N of the second.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

import torch
from torch import Tensor


def doubled(net_input: Dict[str, Any], batch: int) -> Dict[str, Any]:
    """The input with each row twice. Raises ValueError where no tensor of it has `batch` rows."""

    def has_rows(value: Any) -> bool:
        return torch.is_tensor(value) and value.dim() > 0 and value.size(0) == batch

    if not any(map(has_rows, net_input.values())):
        raise ValueError(
            f"codistill_rdrop needs a task whose inputs have the batch in front, here {batch} rows, but none of "
            f"{', '.join(map(str, net_input))} has."
        )
    return {name: value.repeat_interleave(2, 0) if has_rows(value) else value for name, value in net_input.items()}


def passes_first(target: Tensor) -> Tensor:
    """Where the positions of a doubled batch are, passes first: [2N]. `target`: of the batch itself, [B] or [B, T]."""
    rows = torch.arange(2 * target.numel(), device=target.device).view(target.size(0), 2, -1)
    return rows.transpose(0, 1).reshape(-1)


def symmetric_kl(log_probs_2NV: Tensor) -> Tensor:
    """(KL(p ‖ q) + KL(q ‖ p)) / 2 at each position, [N]; differentiable. Passes first."""
    p_NV, q_NV = log_probs_2NV.chunk(2)
    return ((p_NV.exp() - q_NV.exp()) * (p_NV - q_NV)).sum(-1) / 2


def symmetric_kl_gradient(logits_2NV: Tensor, probs_2NV: Tensor, log_total_2N: Tensor) -> Tuple[Tensor, Tensor]:
    """`symmetric_kl` [N], and its gradient in the logits [2N, V]. `log_total_2N`: log Σ exp(logits)."""
    (p_NV, q_NV), (log_p_N, log_q_N) = probs_2NV.chunk(2), log_total_2N.chunk(2)
    ratio_NV = torch.sub(*logits_2NV.chunk(2)).sub_((log_p_N - log_q_N).unsqueeze(-1))  # log p − log q
    to_q_N, to_p_N = torch.linalg.vecdot(p_NV, ratio_NV), -torch.linalg.vecdot(q_NV, ratio_NV)
    apart_NV = p_NV - q_NV
    gradient_2NV = torch.cat([
        p_NV * (ratio_NV - to_q_N.unsqueeze(-1)) + apart_NV,
        q_NV * (-ratio_NV - to_p_N.unsqueeze(-1)) - apart_NV,
    ])  # fmt: skip
    return (to_q_N + to_p_N) / 2, gradient_2NV.div_(2)


def folded(values_2N: Tensor) -> Tensor:
    """The mean over both passes: [N] from [2N], passes first."""
    return values_2N.view(2, -1).mean(0)
