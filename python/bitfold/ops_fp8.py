"""What torch must know about the ops of csrc/torch/fp8.cpp beside their kernels, as ops.py has it for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfold.activations import Activations
from bitfold.ops import check_device, past_autograd, product_gradients, refuse_backward, register_autocast

# ---- shapes ----


def _round_shape(x: Tensor, x_scale: Tensor | None = None) -> list[Tensor]:
    check_device(x, x_scale)
    return [x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:-1], dtype=torch.float32)]


def _linear_shape(
    x: Tensor,
    planes: Sequence[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    check_device(x, *planes, bias, x_scale)
    return x.new_empty((*x.shape[:-1], n))


# ---- gradients: rounding x is taken for doing nothing (straight through); all else is a constant ----


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, ctx.format, ctx.n, ctx.k, _, _ = inputs
    ctx.save_for_backward(*planes)


def _register_gradients(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        planes = list(ctx.saved_tensors)
        return product_gradients(
            ctx, grad, planes, lambda: ops.linear_grad_x(grad, planes, ctx.format, ctx.n, ctx.k)
        )

    torch.library.register_autograd(f"{namespace}::linear_fp8", backward, setup_context=_context)
    torch.library.register_autograd(f"{namespace}::round_fp8", refuse_backward("round_fp8"))


def register(namespace: str) -> None:
    """Registers the above for the ops of `namespace`, whose schemas are those of bitfold's."""
    torch.library.register_fake(f"{namespace}::round_fp8", _round_shape)
    torch.library.register_fake(f"{namespace}::linear_fp8", _linear_shape)
    _register_gradients(namespace)
    register_autocast(namespace, "linear_fp8")


register("bitfold")


# ---- a call that costs little ----

_linear_fp8 = torch.ops.bitfold.linear_fp8.default


def linear_fp8(
    x: Tensor,
    planes: list[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None,
    activations: Activations,
    x_scale: Tensor | None = None,
    *others: Tensor | None,
) -> Tensor:
    """torch.ops.bitfold.linear_fp8 with x_scale where the activations are static, past its autograd kernel where no
    gradient is wanted (see ops.past_autograd). others: what a layer keeps for other activations, unused."""
    scale = x_scale if activations.is_static else None
    return past_autograd(_linear_fp8, x, planes, format, n, k, bias, scale)
