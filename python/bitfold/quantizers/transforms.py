"""Changes of a model's weights that leave what it computes alone, and make them easier to round.

Where the outputs of one matrix (or of a norm) are the inputs of others, a channel may be divided by any s > 0 on one
side and multiplied on the other: (W diag(s)) (x / s) = W x. AWQ and SmoothQuant choose s.

What is divided is rounded to the dtype it is stored in. Gemma's norms, which are stored as the distance from 1, lose
most of their digits where 1 + w becomes small. So a norm is divided first, and the scales are what division really did:
`divide_norm` returns them, and the columns are multiplied by those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_scales(scales: Tensor, channels: int) -> Tensor:
    """The scales in float64. Raises ValueError unless they are `channels` positive finite numbers."""
    if scales.shape != (channels,):
        raise ValueError(
            f"scales has shape {list(scales.shape)}; it must be [{channels}], one for each channel"
        )
    wrong = ~((scales > 0) & scales.isfinite())
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"scales[{at}] is {scales[at].item()}; it must be positive and finite")
    return scales.to(torch.float64)


def divide_norm(weight: Tensor, scales: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """A norm that multiplies by `offset + weight`, divided by `scales`.

    weight: [c], of any floating dtype; scales: [c]; offset: 1 for Gemma's norms. Returns the new weight, in the dtype
    of `weight`, and the scales by which it really is smaller (float64 [c]): these and no others belong to the columns.
    Channels that the norm silences keep the scales that were asked for.

    Raises ValueError where scales are not positive and finite, or divide a channel to zero.
    """
    scales = check_scales(scales, len(weight))
    before = weight.to(torch.float64) + offset
    divided = (before / scales - offset).to(weight.dtype)
    after = divided.to(torch.float64) + offset
    lost = (before != 0) & ((after == 0) | ~after.isfinite() | (after.sign() != before.sign()))
    if lost.any():
        at = int(lost.nonzero()[0])
        raise ValueError(
            f"scales[{at}] is {scales[at].item():.4g}, which {weight.dtype} can't divide the norm's "
            f"{before[at].item():.4g} by; it must be nearer to 1"
        )
    return divided, torch.where(before == 0, scales, before / after)


def divide_rows(tensor: Tensor, scales: Tensor, rows: slice = slice(None)) -> Tensor:
    """A weight [n, k] or a bias [n] whose rows `rows` are divided by `scales`; the others are as they were.

    Raises ValueError where scales are not positive and finite, one for each of the rows.
    """
    divided = tensor.clone()
    part = tensor[rows].to(torch.float64)
    scales = check_scales(scales, len(part))
    divided[rows] = (part / (scales[:, None] if tensor.dim() == 2 else scales)).to(tensor.dtype)
    return divided


def multiply_columns(weight: Tensor, scales: Tensor) -> Tensor:
    """weight [n, k] whose columns are multiplied by `scales` [k], in its dtype.

    Raises ValueError where scales are not positive and finite.
    """
    return (weight.to(torch.float64) * check_scales(scales, weight.shape[1])).to(weight.dtype)


def smooth_scales(
    largest: Tensor, weights: Sequence[Tensor], alpha: float = 0.5, smallest: float = 1e-5
) -> Tensor:
    """SmoothQuant's scales (Xiao et al. 2022, equation 4): s = max|x|^alpha / max|w|^(1 - alpha), channel by channel.

    largest: [k], the largest absolute input of each channel; weights: [n, k], those that share the input; alpha: how
    much of the spread goes from the inputs into the weights, 0 to 1; smallest: maxima are at least so large. Returns
    float64 [k], for the columns; inputs are divided by it.

    Raises ValueError where alpha is out of range, there are no weights, or an input is negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 to 1")
    if not weights:
        raise ValueError("weights is empty; it must have the matrices that share the input")
    if not (largest.isfinite() & (largest >= 0)).all():
        raise ValueError(
            "largest has a negative or not finite entry; it must hold the largest absolute inputs"
        )
    columns = torch.stack([weight.detach().abs().amax(0) for weight in weights]).amax(0)
    x, w = (side.to(torch.float64).clamp(min=smallest) for side in (largest, columns))
    return x**alpha / w ** (1 - alpha)
