"""What torch must know about linear_int8 beside its kernels (csrc/torch/int8.cpp): shapes, gradients, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfold.activations import Activations
from bitfold.ops import check_device, past_autograd, product_gradients, register_autocast


def _shape(
    x: Tensor,
    planes: Sequence[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    per_row: bool = False,
    x_scale: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    check_device(x, *planes, bias, x_scale, outlier_columns, outlier_weight)
    return x.new_empty((*x.shape[:-1], n))


# ---- the gradient: straight through the rounding of x, so that of a product with the decoded weight ----


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, ctx.format, ctx.n, ctx.k, _, _, _, _, columns, copy = inputs
    ctx.planes = len(planes)
    ctx.save_for_backward(*planes, *([] if columns is None else [columns, copy]))


def _register_gradient(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        planes, copied = list(ctx.saved_tensors[: ctx.planes]), ctx.saved_tensors[ctx.planes :]

        def of_x() -> Tensor:
            plain = ops.linear_grad_x(grad, planes, ctx.format, ctx.n, ctx.k)
            if not copied:
                return plain
            # Columns with a copy are multiplied with that: an [n, c] weight in a cast format.
            columns, copy = copied
            cast = "fp16" if copy.dtype == torch.float16 else "bf16"
            exact = ops.linear_grad_x(grad, [copy], cast, ctx.n, copy.shape[1])
            return plain.index_copy(-1, columns.long(), exact)

        return product_gradients(ctx, grad, planes, of_x)

    torch.library.register_autograd(f"{namespace}::linear_int8", backward, setup_context=_context)


def register(namespace: str) -> None:
    """Registers the above for the ops of `namespace`, whose schemas are those of bitfold's."""
    torch.library.register_fake(f"{namespace}::linear_int8", _shape)
    _register_gradient(namespace)
    register_autocast(namespace, "linear_int8")


register("bitfold")


# ---- a call that costs little ----

_linear_int8 = torch.ops.bitfold.linear_int8.default


def linear_int8(
    x: Tensor,
    planes: list[Tensor],
    format: str,
    n: int,
    k: int,
    bias: Tensor | None,
    activations: Activations,
    x_scale: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    """torch.ops.bitfold.linear_int8 with what the activations say, past its autograd kernel where no gradient is wanted
    (see ops.past_autograd). Of x_scale and the copy of columns those are used that the activations ask for."""
    return past_autograd(
        _linear_int8,
        x,
        planes,
        format,
        n,
        k,
        bias,
        activations.threshold,
        activations.per_row,
        x_scale if activations.is_static else None,
        outlier_columns if activations.exact_outliers else None,
        outlier_weight if activations.exact_outliers else None,
    )
