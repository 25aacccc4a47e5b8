"""What torch must know about the ops of csrc/torch/ops.cpp beside their kernels: shapes, gradients, autocast.

Importing this module registers all of it for torch.ops.bitfold. Sizes come from the formats' laws, as plain
numbers that divide symbolic ints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfold.formats import parse, plane_size

# ---- shapes ----


def check_device(first: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device."""
    # One meta tensor among others leads here from real tensors too: never answer them with a shape.
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"the tensors are on {first.device} and {tensor.device}; all must be on one device"
            )


def _encode_shape(
    weight: Tensor,
    format: str,
    nested_offset: Tensor | None = None,
    clamp: bool = False,
    importance: Tensor | None = None,
) -> list[Tensor]:
    n, k = weight.shape
    parse(format).check_columns(k)
    return [weight.new_empty(law.shape(n, k), dtype=law.dtype) for law in parse(format).planes]


def _decode_shape(
    planes: Sequence[Tensor], format: str, n: int, k: int, dtype: torch.dtype, layout: str = "rows"
) -> Tensor:
    check_device(*planes)
    return planes[0].new_empty((n, k), dtype=dtype)


def _pack_shape(
    codes: Tensor, scales: Tensor | None, zeros: Tensor | None, format: str, nested: Sequence[Tensor]
) -> list[Tensor]:
    n, k = codes.shape
    return [codes.new_empty(law.shape(n, k), dtype=law.dtype) for law in parse(format).planes]


def _unpack_shape(
    planes: Sequence[Tensor], format: str, n: int, k: int, layout: str = "rows"
) -> list[Tensor]:
    check_device(*planes)
    rows, columns = plane_size(n, k, layout)
    shapes = [law.logical_shape(rows, columns) for law in parse(format).planes]
    shapes[0] = (n, k)
    return [plane.new_empty(shape) for plane, shape in zip(planes, shapes, strict=True)]


def _linear_shape(
    x: Tensor,
    planes: Sequence[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None = None,
    layout: str = "rows",
    activations: str = "float",
) -> Tensor:
    check_device(x, *planes, bias)
    return x.new_empty((*x.shape[:-1], n))


def _linear_grad_x_shape(
    grad: Tensor, planes: Sequence[Tensor], format: str, n: int, k: int, layout: str = "rows"
) -> Tensor:
    check_device(grad, *planes)
    return grad.new_empty((*grad.shape[:-1], k))


def _embedding_shape(
    ids: Tensor,
    planes: Sequence[Tensor],
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype,
    layout: str = "rows",
) -> Tensor:
    check_device(ids, *planes)
    return ids.new_empty((*ids.shape, k), dtype=dtype)


def _block_grid_shape(blocks: Tensor, format: str, n: int, k: int) -> list[Tensor]:
    # How many scales and levels a type of blocks has is known to csrc/formats/block_codes.hpp alone.
    raise NotImplementedError("bitfold::block_grid is not for torch.compile: it has no shape without data")


def _put_block_codes_shape(blocks: Tensor, codes: Tensor, format: str) -> Tensor:
    check_device(blocks, codes)
    return torch.empty_like(blocks)


def _gptq_factor_shape(hessian: Tensor, order: Tensor, unit: float, damping: float) -> list[Tensor]:
    check_device(hessian, order)
    k = hessian.shape[0]
    return [hessian.new_empty((k, k), dtype=torch.float32), hessian.new_empty(1, dtype=torch.int64)]


def _gptq_columns_shape(
    weight: Tensor,
    order: Tensor,
    factor: Tensor,
    begin: int,
    step: Tensor,
    offset: Tensor,
    group: Tensor,
    table: Tensor | None,
    low: int,
    high: int,
    behind: Tensor | None = None,
    round: bool = True,
) -> list[Tensor]:
    check_device(weight, order, factor, step, offset, group, table, behind)
    n, c = weight.shape
    return [
        weight.new_empty((n, c if round else 0), dtype=torch.uint8),
        weight.new_empty((0 if behind is None else c, n)),
        weight.new_empty(n, dtype=torch.float64),
    ]


def _search_steps_shape(
    weight: Tensor,
    group: int,
    start: Tensor,
    factors: Tensor,
    stored: torch.dtype,
    zeros: Tensor | None,
    importance: Tensor | None,
    table: Tensor | None,
    low: int,
    high: int,
) -> list[Tensor]:
    check_device(weight, start, factors, zeros, importance, table)
    return [torch.empty_like(start), torch.empty_like(start)]


_OF_QUANTIZERS = ("block_grid", "put_block_codes", "gptq_factor", "gptq_columns", "search_steps")

# ---- gradients: with respect to x, grad and bias; packed weights are constants ----


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, ctx.format, ctx.n, ctx.k, _, ctx.layout, _ = inputs
    ctx.save_for_backward(*planes)


def _linear_grad_x_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, ctx.format, ctx.n, ctx.k, ctx.layout = inputs
    ctx.save_for_backward(*planes)


def product_gradients(
    ctx: Any, grad: Tensor, planes: list[Tensor], of_x: Callable[[], Tensor]
) -> tuple[Any, ...]:
    """Those of an op whose arguments begin x, planes, format, n, k, bias, and whose output has the gradient `grad`
    [..., n]; of_x: makes that of x, where it is asked for."""
    needed = ctx.needs_input_grad
    of_bias = None
    if len(needed) > 5 and needed[5]:
        of_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    found = (of_x() if needed[0] else None, [None] * len(planes), None, None, None, of_bias)
    # The dispatcher drops trailing arguments that equal their defaults: one gradient for each that is left.
    return (*found, *[None] * len(needed))[: len(needed)]


def _register_gradients(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Rounding x to 8 bits has the gradient 0 or none: what it rounds is taken for what it gives (straight through).
        planes = list(ctx.saved_tensors)
        return product_gradients(
            ctx, grad, planes, lambda: ops.linear_grad_x(grad, planes, ctx.format, ctx.n, ctx.k, ctx.layout)
        )

    def linear_grad_x_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        planes = list(ctx.saved_tensors)
        grad_grad = ops.linear(grad, planes, ctx.format, ctx.n, ctx.k, None, ctx.layout)
        return (grad_grad, [None] * len(planes), None, None, None, None)[: len(ctx.needs_input_grad)]

    register = torch.library.register_autograd
    register(f"{namespace}::linear", linear_backward, setup_context=_linear_context)
    register(f"{namespace}::linear_grad_x", linear_grad_x_backward, setup_context=_linear_grad_x_context)
    for name in ("encode", "decode", "pack", "unpack", "embedding", *_OF_QUANTIZERS):
        register(f"{namespace}::{name}", refuse_backward(name))


def refuse_backward(name: str) -> Callable[..., None]:
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"bitfold::{name} is not differentiable: detach what it is given.")

    return backward


# ---- autocast: x and bias are cast as F.linear casts them, planes never are ----


def _register_autocast(library: torch.library.Library, name: str, device_type: str, key: str) -> None:
    op = getattr(getattr(torch.ops, library.ns), name)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor

    def product(
        x: Tensor, planes: list[Tensor], format: str, n: int, k: int, bias: Tensor | None = None, *rest: Any
    ) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return op(cast(x), planes, format, n, k, None if bias is None else cast(bias), *rest)

    library.impl(name, product, key)


_libraries: list[torch.library.Library] = []  # what they registered goes with them


def register_autocast(namespace: str, name: str) -> None:
    """For an op of `namespace` that multiplies: its arguments begin as those of linear do."""
    library = torch.library.Library(namespace, "IMPL")
    _register_autocast(library, name, "cpu", "AutocastCPU")
    _register_autocast(library, name, "cuda", "AutocastCUDA")
    _libraries.append(library)


# ---- all of it, for torch.ops.bitfold and for the tests' torch.ops.bitfold_emulated ----

_SHAPES: dict[str, Callable[..., Any]] = {
    "encode": _encode_shape,
    "decode": _decode_shape,
    "pack": _pack_shape,
    "unpack": _unpack_shape,
    "linear": _linear_shape,
    "linear_grad_x": _linear_grad_x_shape,
    "embedding": _embedding_shape,
    "block_grid": _block_grid_shape,
    "put_block_codes": _put_block_codes_shape,
    "gptq_factor": _gptq_factor_shape,
    "gptq_columns": _gptq_columns_shape,
}


def register(namespace: str) -> None:
    """Registers the above for the ops of `namespace`, whose schemas are those of bitfold's."""
    for name, shape in _SHAPES.items():
        torch.library.register_fake(f"{namespace}::{name}", shape)
    _register_gradients(namespace)
    register_autocast(namespace, "linear")


register("bitfold")


# ---- a call that costs little ----

_linear = torch.ops.bitfold.linear.default


def linear(
    x: Tensor,
    planes: list[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None,
    layout: str,
    activations: str = "float",
) -> Tensor:
    """torch.ops.bitfold.linear, past its autograd kernel where no gradient is wanted."""
    return past_autograd(_linear, x, planes, format, n, k, bias, layout, activations)


def past_autograd(
    op: Callable[..., Tensor],
    x: Tensor,
    planes: list[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    """An op that multiplies, past its autograd kernel where no gradient is wanted.

    That kernel is Python and costs some 5 us a call, as much as the op itself. Inference mode is past it
    already, and the guard costs 1 us.
    """
    # In this order: torch.compile can't trace the question for inference mode.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(x, planes, format, n, k, bias, *rest)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return op(x, planes, format, n, k, bias, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, planes, format, n, k, bias, *rest)
