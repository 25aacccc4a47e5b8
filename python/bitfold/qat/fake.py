"""Rounding that lets gradients through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitfold.activations import Activations
from bitfold.formats import Format, parse
from bitfold.qtensor import QTensor, encode, pack


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def round_to(values: Tensor, format: str) -> Tensor:
    """[n, k] numbers as `format` stores them, in their own dtype; the gradient passes as if nothing had happened."""
    return _StraightThrough.apply(values, encode(values.detach(), format).decode(values.dtype))


def _round_8_bits(x: Tensor, block: int) -> Tensor:
    """[m, k] numbers in 8 bits with a step for each block of a row, in the operations of docs/gguf-blocks.md
    (Activations of 8 bits), which are those of docs/activations.md where the block is the row."""
    values = x.detach().float().unflatten(1, (-1, block))
    largest = values.abs().amax(-1, keepdim=True)
    codes = (values * (127 / largest)).round()
    rounded = torch.where(largest < 2.0**-100, 0.0, codes * (largest / 127))
    return _StraightThrough.apply(x, rounded.flatten(1).to(x.dtype))


def round_inputs(x: Tensor, activations: Activations, format: Format) -> Tensor:
    """The input [m, k] of a layer as `activations` round it in front of a weight in `format`; the gradient passes as if
    nothing had happened.
    """
    if activations.is_float:
        return x
    if activations.op == "linear_fp8":
        codes, scales = torch.ops.bitfold.round_fp8(x.detach())
        rounded = codes.view(torch.float8_e4m3fn).float() * scales[:, None]
        return _StraightThrough.apply(x, rounded.to(x.dtype))
    block = format.group if format.grid == "block" else x.shape[1]
    if not activations.threshold:
        return _round_8_bits(x, block)
    large = (x.detach().abs() >= activations.threshold) & x.isfinite()
    outliers = large if activations.per_row else large.any(0)
    return torch.where(outliers, x, _round_8_bits(x.masked_fill(outliers, 0), block))


# ---- learned steps ----


def check_learned(format: str) -> Format:
    """Raises ValueError unless the steps of a format can be learned: those of symmetric integers."""
    parsed = parse(format)
    if parsed.grid != "integer" or parsed.asymmetric:
        raise ValueError(
            f"learned_steps is True, but the format is {parsed}; it must be of symmetric integers, as int4-g128 is"
        )
    return parsed


def stored_steps(steps: Tensor, format: Format) -> Tensor:
    """Steps as the plane of scales holds them: at least its smallest normal number, rounded to its dtype."""
    dtype = format.planes[1].dtype
    return steps.detach().clamp(min=torch.finfo(dtype).tiny).to(dtype)


def pack_learned(weight: Tensor, steps: Tensor, format: Format) -> QTensor:
    """What `round_learned` computes with, packed."""
    stored = stored_steps(steps, format)
    middle = 1 << format.bits - 1
    levels = (weight.detach().float() / _spread(stored.float(), format, weight)).round()
    codes = levels.clamp(-middle, middle - 1) + middle
    return pack(codes.to(torch.uint8), stored, format=format.canonical)


def _spread(steps: Tensor, format: Format, weight: Tensor) -> Tensor:
    """The step of every weight: [n or 1, groups] -> [n, k]."""
    n, k = weight.shape
    group = format.group if format.group > 0 else k
    return steps.repeat_interleave(group, 1)[:, :k].expand(n, k)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, steps: Tensor, format: Format) -> Tensor:
        ctx.save_for_backward(weight, steps)
        ctx.format = format
        return pack_learned(weight, steps, format).decode(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, steps = ctx.saved_tensors
        format: Format = ctx.format
        grad = grads[0].float()
        quotient = weight.float() / _spread(stored_steps(steps, format).float(), format, weight)
        low, high = -(1 << format.bits - 1), (1 << format.bits - 1) - 1
        inside = (quotient >= low) & (quotient <= high)
        slope = torch.where(inside, quotient.round() - quotient, quotient.clamp(low, high))
        sums = _sum_groups(grad * slope, format, steps)
        shared = weight.numel() / steps.numel()
        grad_steps = sums / math.sqrt(shared * max(1, high))
        return (grad * inside).to(weight.dtype), grad_steps.to(steps.dtype), None


def _sum_groups(values: Tensor, format: Format, steps: Tensor) -> Tensor:
    """[n, k] -> sums over the weights that share a step, [n or 1, groups]."""
    n, k = values.shape
    group = format.group if format.group > 0 else k
    padded = torch.nn.functional.pad(values, (0, -k % group))
    sums = padded.reshape(n, -1, group).sum(2)
    return sums.sum(0, keepdim=True) if steps.shape[0] < n else sums


def round_learned(weight: Tensor, steps: Tensor, format: Format) -> Tensor:
    """A weight [n, k] rounded to whole multiples of its steps [n or 1, groups], which train with it."""
    return _LearnedStep.apply(weight, steps, format)
