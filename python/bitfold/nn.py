"""Modules whose weight is a quantized matrix; embeddings are in embeddings.py.

The planes are frozen nn.Parameters with the planes' names, so that state_dict, FSDP2 and offloading treat
them as any weight. `.to(dtype)`, `.half()`, `.bfloat16()` ... move devices, change the dtype of the bias (and
of an embedding's output), and never touch a plane: plain Module.to would round fp32 scales to bf16.
FSDP2's mixed precision would cast the float planes as it gathers them, which the ops refuse: shard quantized
modules without a `param_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import ops, ops_fp8, ops_int8
from bitfold.activations import FLOAT, Activations
from bitfold.activations import read as read_activations
from bitfold.formats import parse, plane_shapes
from bitfold.hugepages import use_huge_pages
from bitfold.qtensor import QTensor, column_order, gather_columns

LISTENERS: list[Callable[[nn.Module, str], None]] = []
"""Called with each model that was given quantized modules, and the recipe's name: so that the library that the model
comes from saves it as what it is now (bitfold.integration)."""


def announce(model: nn.Module, recipe: str = "") -> None:
    """Tell whoever listens that a model has quantized modules, all of them with values."""
    for listener in LISTENERS:
        listener(model, recipe)


class PlaneModule(nn.Module):
    """A module that holds the planes of one or more matrices: what all quantized modules share.

    format, layout: of the matrices; shape: (n, k) of one, (experts, n, k) of a stack. Planes that are parameters
    already are kept as they are: two modules made from the same ones are tied.
    """

    format: str
    layout: str
    shape: tuple[int, ...]
    plane_names: tuple[str, ...]
    g_idx: nn.Parameter | None

    def _hold(
        self,
        format: str,
        layout: str,
        shape: tuple[int, ...],
        planes: Mapping[str, Tensor],
        g_idx: Tensor | None = None,
    ) -> None:
        self.format, self.layout, self.shape = format, layout, shape
        self.plane_names = tuple(planes)
        for name, plane in [*planes.items(), ("g_idx", g_idx)]:
            frozen = plane is None or (isinstance(plane, nn.Parameter) and not plane.requires_grad)
            self.register_parameter(name, plane if frozen else nn.Parameter(plane, requires_grad=False))  # type: ignore[arg-type]

    def planes(self) -> list[Tensor]:
        """The planes in the order of the format, as the ops take them."""
        parameters = self._parameters
        return [parameters[name] for name in self.plane_names]  # type: ignore[misc]

    _part_names: tuple[str, ...] = ("g_idx",)  # beside the planes

    def named_parts(self) -> dict[str, nn.Parameter]:
        """All that makes the weight and what it is multiplied with: the planes and, where they are there, g_idx and
        what `QuantLinear` keeps for its activations."""
        names = [*self.plane_names, *self._part_names]
        return {name: part for name in names if (part := self._parameters[name]) is not None}

    def parts(self) -> list[nn.Parameter]:
        """The same without names."""
        return list(self.named_parts().values())

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts())

    def prepare(self) -> None:
        """What the kernels want of the planes; called after loading, never inside forward.

        Large planes in the CPU's memory are put into huge pages where the system has them; they stay where and what
        they are. No kernel wants a copy of them: one belongs here as a non-persistent tensor, to be dropped by `_apply`
        and `_load_from_state_dict`.
        """
        for plane in self.planes():
            use_huge_pages(plane)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        parts = {id(part) for part in self.parts()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in parts and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Module copies with a cast; a plane of another dtype is another format.
        wrong = [
            f"{prefix}{name} is {state_dict[prefix + name].dtype}; for {self.format} it must be {part.dtype}"
            for name, part in self.named_parts().items()
            if prefix + name in state_dict and state_dict[prefix + name].dtype != part.dtype
        ]
        if wrong:
            error_msgs.extend(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class QuantModule(PlaneModule):
    """A module that holds an [n, k] QTensor: the half that QuantLinear and QuantEmbedding share."""

    shape: tuple[int, int]

    def __init__(self, qtensor: QTensor):
        super().__init__()
        self._hold(qtensor.format, qtensor.layout, qtensor.shape, qtensor.planes, qtensor.g_idx)

    @property
    def qtensor(self) -> QTensor:
        """The weight; shares the planes of this module."""
        planes = dict(zip(self.plane_names, self.planes(), strict=True))
        return QTensor(self.format, self.shape, planes, self.layout, self.g_idx)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as plain numbers: a new [n, k] tensor."""
        return self.qtensor.decode(dtype)


def empty_qtensor(
    format: str,
    n: int,
    k: int,
    device: torch.device | str | None = None,
    layout: str = "rows",
    with_g_idx: bool = False,
) -> QTensor:
    """An n x k matrix with uninitialised planes (device "meta": no memory at all), to load into. with_g_idx: its g_idx
    is that of neighbouring columns.
    """
    parsed = parse(format)
    parsed.check_columns(k)
    shapes = plane_shapes(parsed, n, k, layout)
    planes = {
        law.name: torch.empty(shapes[law.name], dtype=law.dtype, device=device) for law in parsed.planes
    }
    group = max(parsed.group, 1)
    g_idx = torch.arange(k, dtype=torch.int32, device=device) // group if with_g_idx else None
    return QTensor(parsed.canonical, (n, k), planes, layout, g_idx)


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear_int8": ops_int8.linear_int8,
    "linear_fp8": ops_fp8.linear_fp8,
}
"""What multiplies an input that is rounded row by row, by the op's name: the arguments are the same."""


class Multiplies(PlaneModule):
    """A module that does something with its input before it multiplies: `activations`, which may be set at any time,
    also as a string. They are no part of the state dict."""

    _activations = FLOAT
    _op = "linear"  # of PRODUCTS, or linear

    @property
    def activations(self) -> Activations:
        return self._activations

    @activations.setter
    def activations(self, activations: str | Activations) -> None:
        wanted = read_activations(activations)
        self.check_activations(wanted)
        if self.layout != "rows" and not wanted.is_float:
            raise ValueError(f"activations is '{wanted}', and the weight's blocks run across its rows")
        self._activations = wanted
        self._op = wanted.op if parse(self.format).grid != "block" else "linear"

    def check_activations(self, wanted: Activations) -> None:
        """Raises ValueError unless the weight can be multiplied so, and what that takes is there."""
        wanted.check(self.format)
        if wanted.needs_calibration:
            raise ValueError(
                f"activations is '{wanted}', which take something from calibration; this layer has none of it"
            )


OUTLIER_DTYPES = (torch.float16, torch.bfloat16)
KEPT_PARTS = ("x_scale", "outlier_columns", "outlier_weight")
"""What a layer may keep for its activations beside the planes."""


class QuantLinear(QuantModule, Multiplies):
    """nn.Linear on a quantized weight: [..., in_features] -> [..., out_features], in the dtype of its input.

    qtensor: [out_features, in_features]; bias: [out_features] or None, of the dtype of the inputs to come; a
    Parameter is kept as it is. Differentiable with respect to input and bias. Where qtensor has g_idx, the columns of
    the input are gathered once, in an order that `prepare` works out.

    activations: what is done with the input; and what that takes, frozen as the planes are: x_scale: float32 [], the
    step of static activations; outlier_columns: int32 [c], ascending, and outlier_weight: float16 or bfloat16
    [out_features, c], a copy of these columns of the weight as they were before rounding.
    """

    bias: nn.Parameter | None
    x_scale: nn.Parameter | None
    outlier_columns: nn.Parameter | None
    outlier_weight: nn.Parameter | None
    _part_names = ("g_idx", *KEPT_PARTS)
    _order: Tensor | None = (
        None  # of the columns in the planes, from `prepare` until something may change g_idx
    )

    def __init__(
        self,
        qtensor: QTensor,
        bias: Tensor | None = None,
        activations: str | Activations = FLOAT,
        *,
        x_scale: Tensor | None = None,
        outlier_columns: Tensor | None = None,
        outlier_weight: Tensor | None = None,
    ):
        super().__init__(qtensor)
        self.out_features, self.in_features = qtensor.shape
        for name, part in zip(KEPT_PARTS, (x_scale, outlier_columns, outlier_weight), strict=True):
            kept = part is None or (isinstance(part, nn.Parameter) and not part.requires_grad)
            self.register_parameter(name, part if kept else nn.Parameter(part, requires_grad=False))  # type: ignore[arg-type]
        self._check_kept_shapes()
        self.check_kept()
        self.activations = activations
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{self.out_features}]")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def empty(
        cls,
        format: str,
        n: int,
        k: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: str = "rows",
        with_g_idx: bool = False,
        activations: str | Activations = FLOAT,
        outliers: int = 0,
        outlier_dtype: torch.dtype | None = None,
        with_x_scale: bool = False,
    ) -> QuantLinear:
        """One with uninitialised planes, to load into; dtype is the bias's; outliers: columns that it has a copy of, of
        outlier_dtype."""
        values = torch.empty(n, device=device, dtype=dtype) if bias else None
        wanted = read_activations(activations)
        return cls(
            empty_qtensor(format, n, k, device, layout, with_g_idx),
            values,
            wanted,
            x_scale=torch.ones((), dtype=torch.float32, device=device)
            if with_x_scale or wanted.is_static
            else None,
            outlier_columns=torch.arange(outliers, dtype=torch.int32, device=device) if outliers else None,
            outlier_weight=torch.empty(n, outliers, dtype=outlier_dtype, device=device) if outliers else None,
        )

    def _check_kept_shapes(self) -> None:
        scale, columns, weight = self.x_scale, self.outlier_columns, self.outlier_weight
        if scale is not None and (scale.dtype != torch.float32 or scale.dim() != 0):
            raise ValueError(f"x_scale is {_kind(scale)}; it must be a torch.float32 of shape []")
        if (columns is None) != (weight is None):
            raise ValueError("one of outlier_columns and outlier_weight is given; it must be both or none")
        if columns is None or weight is None:
            return
        if columns.dtype != torch.int32 or columns.dim() != 1 or not len(columns):
            raise ValueError(
                f"outlier_columns is {_kind(columns)}; it must be a torch.int32 of shape [c], c > 0"
            )
        wanted = [self.out_features, len(columns)]
        if weight.dtype not in OUTLIER_DTYPES or list(weight.shape) != wanted:
            raise ValueError(
                f"outlier_weight is {_kind(weight)}; it must be a torch.float16 or torch.bfloat16 of shape {wanted}"
            )

    def check_kept(self) -> None:
        """Raises ValueError where the values of what the layer keeps can't be: what no shape tells."""
        check_kept(self.x_scale, self.outlier_columns, self.in_features)

    def check_activations(self, wanted: Activations) -> None:
        wanted.check(self.format)
        if wanted.is_static and self.x_scale is None:
            raise ValueError(f"activations is '{wanted}', which take an x_scale; this layer has none")
        if wanted.exact_outliers and self.outlier_columns is None:
            raise ValueError(
                f"activations is '{wanted}', which take outlier_columns and outlier_weight; this layer has none"
            )

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as plain numbers, as it is multiplied with: copies of outlier columns in their place, where
        `activations` take them."""
        weight = super().decode(dtype)
        if self._activations.exact_outliers:
            put_copies(weight, self.outlier_columns, self.outlier_weight)  # type: ignore[arg-type]
        return weight

    def prepare(self) -> None:
        super().prepare()
        self._order = None if self.g_idx is None or self.g_idx.is_meta else column_order(self.g_idx)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        self._order = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._order = None
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        # Parameters as attributes go through Module.__getattr__, which a model of 150 layers feels per token.
        parameters = self._parameters
        planes: list[Tensor] = [parameters[name] for name in self.plane_names]  # type: ignore[misc]
        n, k = self.shape
        if parameters["g_idx"] is not None:
            x = gather_columns(x, self._order if self._order is not None else column_order(self.g_idx))  # type: ignore[arg-type]
        if self._op != "linear":
            kept: list[Any] = [parameters[name] for name in KEPT_PARTS]
            product = PRODUCTS[self._op]
            return product(x, planes, self.format, n, k, parameters["bias"], self._activations, *kept)
        return ops.linear(
            x, planes, self.format, n, k, parameters["bias"], self.layout, self._activations.kind
        )

    def extra_repr(self) -> str:
        activations = "" if self._activations.is_float else f", activations={self._activations}"
        activations += "" if self.g_idx is None else ", with g_idx"
        activations += "" if self.outlier_columns is None else f", outliers={len(self.outlier_columns)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}{activations}"
        )


def check_kept(x_scale: Tensor | None, outlier_columns: Tensor | None, k: int) -> None:
    """Raises ValueError where the values of what a layer of k columns keeps for its activations can't be."""
    if x_scale is not None and not x_scale.is_meta and not 0 < float(x_scale) < float("inf"):
        raise ValueError(f"x_scale is {float(x_scale)}; it must be above 0 and finite")
    if outlier_columns is None or outlier_columns.is_meta:
        return
    places = outlier_columns.tolist()
    if places != sorted(set(places)) or places[0] < 0 or places[-1] >= k:
        raise ValueError(
            f"outlier_columns are {places[0]} to {places[-1]}; they must be ascending, and at least 0 and below {k}"
        )


def put_copies(weight: Tensor, outlier_columns: Tensor, outlier_weight: Tensor) -> None:
    """Replace columns of a decoded weight by the copies that a layer keeps of them, in place."""
    weight.index_copy_(1, outlier_columns.long(), outlier_weight.to(weight.dtype))


def _kind(tensor: Tensor) -> str:
    return f"a {tensor.dtype} of shape {list(tensor.shape)}"


def set_activations(model: nn.Module, activations: str | Activations) -> None:
    """Set `activations` of every quantized layer and expert of a model; what isn't quantized computes as it did.

    Raises ValueError, and changes nothing, where one has a format that can't be multiplied so, or where there is none
    to set.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Multiplies)}
    wanted = read_activations(activations)
    for name, layer in layers.items():
        try:
            layer.check_activations(wanted)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from None
    if not layers and not wanted.is_float:
        raise ValueError(f"activations is '{wanted}', but the model has no quantized linear layer")
    for layer in layers.values():
        layer.activations = wanted


def put_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever the model has `old`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
