"""What torch must know about the ops of csrc/torch/fp8.cpp beside their kernels, as ops.py has it for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfold.activations import Activations
from bitfold.ops import check_device

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
        planes, needed = list(ctx.saved_tensors), ctx.needs_input_grad
        grad_x = grad_bias = None
        if needed[0]:
            grad_x = ops.linear_grad_x(grad, planes, ctx.format, ctx.n, ctx.k)
        if len(needed) > 5 and needed[5]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        # The dispatcher drops trailing arguments that equal their defaults: one gradient for each that is left.
        return (grad_x, [None] * len(planes), None, None, None, grad_bias, None)[: len(needed)]

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError("bitfold::round_fp8 is not differentiable: detach what it is given.")

    torch.library.register_autograd(f"{namespace}::linear_fp8", backward, setup_context=_context)
    torch.library.register_autograd(f"{namespace}::round_fp8", refuse)


# ---- autocast: x and bias are cast as F.linear casts them ----


def _register_autocast(library: torch.library.Library, device_type: str, key: str) -> None:
    ops = getattr(torch.ops, library.ns)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor

    def linear_fp8(
        x: Tensor,
        planes: list[Tensor],
        format: str,
        n: int,
        k: int,
        bias: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            offset = None if bias is None else cast(bias)
            return ops.linear_fp8(cast(x), planes, format, n, k, offset, x_scale)

    library.impl("linear_fp8", linear_fp8, key)


_libraries: list[torch.library.Library] = []  # what they registered goes with them


def register(namespace: str) -> None:
    """Registers the above for the ops of `namespace`, whose schemas are those of bitfold's."""
    torch.library.register_fake(f"{namespace}::round_fp8", _round_shape)
    torch.library.register_fake(f"{namespace}::linear_fp8", _linear_shape)
    _register_gradients(namespace)
    library = torch.library.Library(namespace, "IMPL")
    _register_autocast(library, "cpu", "AutocastCPU")
    _register_autocast(library, "cuda", "AutocastCUDA")
    _libraries.append(library)


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
    gradient is wanted (see ops.linear). others: what a layer keeps for other activations, unused."""
    arguments = (x, planes, format, n, k, bias, x_scale if activations.is_static else None)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return _linear_fp8(*arguments)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _linear_fp8(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _linear_fp8(*arguments)
