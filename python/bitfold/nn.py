"""Modules whose weight is a quantized matrix.

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

from bitfold import ops
from bitfold.formats import parse, plane_shapes
from bitfold.hugepages import use_huge_pages
from bitfold.qtensor import QTensor, check_activations, column_order, gather_columns

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

    def parts(self) -> list[nn.Parameter]:
        """The planes, and g_idx where there is one: all parameters that make the weight."""
        names = [*self.plane_names, "g_idx"]
        return [part for name in names if (part := self._parameters[name]) is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, and of g_idx."""
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
        planes = {id(plane) for plane in self.planes()}

        def keep_plane_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in planes and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_plane_dtype, recurse)

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
            f"{key} is {state_dict[key].dtype}; for {self.format} it must be {plane.dtype}"
            for key, plane in zip((prefix + name for name in self.plane_names), self.planes(), strict=True)
            if key in state_dict and state_dict[key].dtype != plane.dtype
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


class Multiplies(PlaneModule):
    """A module whose matrices are multiplied with activations "float" or "int8", as in `bitfold.linear`; may be set at
    any time. It is no part of the state dict."""

    _activations = "float"

    @property
    def activations(self) -> str:
        return self._activations

    @activations.setter
    def activations(self, activations: str) -> None:
        check_activations(activations, self.format)
        self._activations = activations


class QuantLinear(QuantModule, Multiplies):
    """nn.Linear on a quantized weight: [..., in_features] -> [..., out_features], in the dtype of its input.

    qtensor: [out_features, in_features]; bias: [out_features] or None, of the dtype of the inputs to come; a
    Parameter is kept as it is. Differentiable with respect to input and bias. Where qtensor has g_idx, the columns of
    the input are gathered once, in an order that `prepare` works out.
    """

    bias: nn.Parameter | None
    _order: Tensor | None = (
        None  # of the columns in the planes, from `prepare` until something may change g_idx
    )

    def __init__(self, qtensor: QTensor, bias: Tensor | None = None, activations: str = "float"):
        super().__init__(qtensor)
        self.activations = activations
        self.out_features, self.in_features = qtensor.shape
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
    ) -> QuantLinear:
        """One with uninitialised planes, to load into; dtype is the bias's."""
        values = torch.empty(n, device=device, dtype=dtype) if bias else None
        return cls(empty_qtensor(format, n, k, device, layout, with_g_idx), values)

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
        return ops.linear(x, planes, self.format, n, k, parameters["bias"], self.layout, self._activations)

    def extra_repr(self) -> str:
        activations = "" if self._activations == "float" else f", activations={self._activations}"
        activations += "" if self.g_idx is None else ", with g_idx"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}{activations}"
        )


def set_activations(model: nn.Module, activations: str) -> None:
    """Set `activations` of every quantized layer and expert of a model; what isn't quantized computes as it did.

    Raises ValueError, and changes nothing, where one has a format that can't be multiplied so, or where there is none
    to set.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Multiplies)}
    for name, layer in layers.items():
        try:
            check_activations(activations, layer.format)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from None
    if not layers and activations != "float":
        raise ValueError(f"activations is '{activations}', but the model has no quantized linear layer")
    for layer in layers.values():
        layer.activations = activations


class QuantEmbedding(QuantModule):
    """nn.Embedding on a quantized weight: integer ids [...] -> [..., embedding_dim] of `dtype`.

    qtensor: [num_embeddings, embedding_dim]; dtype: of the output, follows `.to(dtype)`; scale: multiplies the output,
    itself rounded to `dtype`, as Gemma's embeddings do. padding_idx is kept for those who ask; the weight is frozen, so
    it has no effect here.
    """

    def __init__(
        self,
        qtensor: QTensor,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ):
        if qtensor.g_idx is not None:
            raise ValueError("qtensor has g_idx; the weight of an embedding must have none")
        super().__init__(qtensor)
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.padding_idx = padding_idx
        self.dtype = dtype
        self.scale = scale

    @classmethod
    def empty(
        cls,
        format: str,
        n: int,
        k: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        layout: str = "rows",
        scale: float = 1.0,
    ) -> QuantEmbedding:
        """One with uninitialised planes, to load into."""
        return cls(empty_qtensor(format, n, k, device, layout), padding_idx, dtype, scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        n, k = self.shape
        rows = torch.ops.bitfold.embedding(ids, self.planes(), self.format, n, k, self.dtype, self.layout)
        return (
            rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}, format={self.format}"


def embedding_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by: sqrt(hidden size) in transformers' Gemma, which has subclasses of
    nn.Embedding for it, 1 elsewhere.

    Raises ValueError for a subclass of nn.Embedding that does something else.
    """
    if isinstance(module, QuantEmbedding):
        return module.scale
    scale = getattr(module, "scalar_embed_scale", None)
    if type(module) is not nn.Embedding and not isinstance(scale, float):
        raise ValueError(f"it is a {type(module).__name__}, a subclass of nn.Embedding")
    return 1.0 if scale is None else scale


def put_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever the model has `old`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
