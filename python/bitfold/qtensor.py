"""A quantized matrix, and the functions on it.

`QTensor` is plain data: a format, a logical shape, a layout and named planes (docs/formats.md). It is no
torch.Tensor subclass, so torch.compile, FSDP and safetensors see nothing but plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from bitfold import _C, ops, ops_int8
from bitfold.activations import Activations
from bitfold.formats import Format, check_layout, parse, plane_size

_ops = torch.ops.bitfold
INT8 = Activations("int8")


class Unpacked(NamedTuple):
    """What the planes say, one element an entry (n rows, k columns, G groups in a row).

    codes: uint8 [n, k] (cast families: the floats themselves); scales: the scale dtype, or uint8 where
    nested, [n, G], 1 row for one scale a matrix and ceil(n / R) for blocks of R rows; zeros: uint8 [n or 1, G];
    nested_scales: float32 [ceil(n * G / 256)]; nested_offset: float32 [1]. None where the format has no such
    plane. g_idx: int32 [k], the group of each column; None where column j is of group j // group.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    nested_scales: Tensor | None = None
    nested_offset: Tensor | None = None
    g_idx: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """An n x k matrix in a quantized format.

    format: any spelling, kept as the canonical string; shape: (n, k); planes: tensors by name, kept in the
    order of the format; layout: "rows", or "flat" (bitsandbytes tensors whose blocks straddle rows).

    g_idx: int32 [k], the group of each column, for matrices whose groups aren't neighbouring columns (GPTQ's
    act-order); kept as it is. The planes then hold the columns in the order `column_order(g_idx)`, in which those of a
    group lie together.

    Raises ValueError where a plane is missing, unknown, or of another shape, dtype or device than the format
    says, and where g_idx doesn't give every group its columns.
    """

    format: str
    shape: tuple[int, int]
    planes: dict[str, Tensor]
    layout: str = "rows"
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        format = parse(self.format)
        check_layout(self.layout)
        n, k = self.shape
        check_planes(format, n, k, self.planes, self.layout)
        if self.g_idx is not None:
            check_g_idx(self.g_idx, format, k, self.layout, self.device)
        object.__setattr__(self, "format", format.canonical)
        object.__setattr__(self, "shape", (n, k))
        object.__setattr__(self, "planes", {law.name: self.planes[law.name] for law in format.planes})

    @property
    def device(self) -> torch.device:
        return next(iter(self.planes.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, and of g_idx."""
        g_idx = 0 if self.g_idx is None else self.g_idx.nbytes
        return sum(plane.nbytes for plane in self.planes.values()) + g_idx

    @property
    def bits_per_weight(self) -> float:
        """Bits of all planes and of g_idx for each of the n * k weights (0 for an empty matrix)."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> QTensor:
        """The same matrix on `device`; no plane changes its dtype."""
        planes = {name: plane.to(device, non_blocking=non_blocking) for name, plane in self.planes.items()}
        g_idx = None if self.g_idx is None else self.g_idx.to(device, non_blocking=non_blocking)
        return QTensor(self.format, self.shape, planes, self.layout, g_idx)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as a contiguous [n, k] tensor of `dtype` (float32, float16, bfloat16 or float64)."""
        decoded = _ops.decode(list(self.planes.values()), self.format, *self.shape, dtype, self.layout)
        return decoded if self.g_idx is None else _in_place(decoded, self.g_idx)

    def unpack(self) -> Unpacked:
        """Logical codes, scales and zeros; `pack` is the exact inverse.

        Raises ValueError for a GGUF block format, whose blocks hold all of them together.
        """
        logical = _ops.unpack(list(self.planes.values()), self.format, *self.shape, self.layout)
        if self.g_idx is not None:
            logical[0] = _in_place(logical[0], self.g_idx)
        return Unpacked(**dict(zip(self.planes, logical, strict=True)), g_idx=self.g_idx)

    def __repr__(self) -> str:
        layout = "" if self.layout == "rows" else f", layout={self.layout!r}"
        layout += "" if self.g_idx is None else ", with g_idx"
        n, k = self.shape
        return (
            f"QTensor({self.format!r}, {n}x{k}, {self.bits_per_weight:.4g} bits per weight, "
            f"{self.nbytes} bytes, device={str(self.device)!r}{layout})"
        )


def check_planes(format: Format, n: int, k: int, planes: dict[str, Tensor], layout: str = "rows") -> None:
    """Raises ValueError, naming the plane, unless `planes` are those of an n x k matrix in `format`."""
    expected = [law.name for law in format.planes]
    format.check_columns(k)
    if set(planes) != set(expected):
        raise ValueError(
            f"planes are {', '.join(planes) or 'none'}; for {format} they must be {', '.join(expected)}"
        )
    rows, columns = plane_size(n, k, layout)
    device = planes[expected[0]].device
    for law in format.planes:
        plane, shape = planes[law.name], law.shape(rows, columns)
        if plane.dtype != law.dtype:
            raise ValueError(f"plane {law.name} is {plane.dtype}; for {format} it must be {law.dtype}")
        if tuple(plane.shape) != shape:
            raise ValueError(
                f"plane {law.name} has shape {list(plane.shape)}; for {n}x{k} {format} it must be "
                f"{list(shape)}"
            )
        if plane.device != device:
            raise ValueError(
                f"plane {law.name} is on {plane.device}; it must be on {device} as {expected[0]} is"
            )


def column_order(g_idx: Tensor) -> Tensor:
    """The columns with those of a group together, groups and the columns of each ascending: int64 [k].

    Column j of the planes is column `column_order(g_idx)[j]` of the matrix.
    """
    return torch.argsort(g_idx, stable=True)


def _in_place(planes_order: Tensor, g_idx: Tensor) -> Tensor:
    """[n, k] in the order of the planes, with every column where the matrix has it."""
    return planes_order.index_select(1, torch.argsort(column_order(g_idx)))


def check_g_idx(g_idx: Tensor, format: Format, k: int, layout: str, device: torch.device) -> None:
    """Raises ValueError unless g_idx gives each group of k columns in `format` as many columns as it has."""
    if format.grid == "block" or format.group <= 0:
        what = "blocks" if format.grid == "block" else "no groups of columns"
        raise ValueError(f"g_idx is given, but {format} has {what}; it must have groups, as int4-g128 has")
    if layout != "rows":
        raise ValueError(f"g_idx is given with the layout {layout!r}; it must be 'rows'")
    if g_idx.dtype != torch.int32 or tuple(g_idx.shape) != (k,):
        raise ValueError(
            f"g_idx is a {g_idx.dtype} of shape {list(g_idx.shape)}; it must be a torch.int32 of shape [{k}]"
        )
    if g_idx.device != device:
        raise ValueError(f"g_idx is on {g_idx.device}; it must be on {device} as the planes are")
    if g_idx.is_meta:
        return
    wrong = (g_idx.sort().values != torch.arange(k, device=device) // format.group).nonzero()
    if len(wrong):
        counts = g_idx.unique(return_counts=True)[1]
        raise ValueError(
            f"g_idx has {len(counts)} groups, {int(g_idx.min())} to {int(g_idx.max())}, of {int(counts.min())} to "
            f"{int(counts.max())} columns; every group but the last must have {format.group} of the {k} columns"
        )


def _flatten(tensor: QTensor) -> tuple[list[Tensor], Any]:
    # Lists, as JSON (torch.export's serialisation of trees) has no tuples.
    children = [*tensor.planes.values(), *([] if tensor.g_idx is None else [tensor.g_idx])]
    return children, [tensor.format, *tensor.shape, tensor.layout, list(tensor.planes)]


def _unflatten(children: Iterable[Any], context: Any) -> QTensor:
    # Unchecked: tree_map puts whatever its function returned in the planes' places.
    format, n, k, layout, names = context
    planes = list(children)
    tensor = object.__new__(QTensor)
    fields = {
        "format": format,
        "shape": (n, k),
        "planes": dict(zip(names, planes, strict=False)),
        "layout": layout,
        "g_idx": planes[len(names)] if len(planes) > len(names) else None,
    }
    for name, value in fields.items():
        object.__setattr__(tensor, name, value)
    return tensor


_pytree.register_pytree_node(QTensor, _flatten, _unflatten, serialized_type_name="bitfold.QTensor")


def encode(
    weight: Tensor,
    format: str,
    *,
    importance: Tensor | None = None,
    clamp: bool = False,
    nested_offset: float | Tensor | None = None,
) -> QTensor:
    """Rounds a matrix to nearest in `format` (docs/formats.md, "Encoding").

    weight: [n, k], float32, float16, bfloat16 or float64, any strides; not differentiated. importance:
    float32 [k], with a GGUF block format: how much the squared error of each column counts in the search for
    scales (llama.cpp's importance matrix; q8_0 and mxfp4 have no search and ignore it). clamp: with a cast
    format, values beyond its range become its largest instead of an error; with a block format, scales beyond
    fp16 are stored as infinity (as llama.cpp's encoders do) instead of an error. nested_offset: with a "-dq"
    format, the offset of the scales instead of their mean.

    Raises ValueError for what is no tensor, an unknown format (with near matches), a NaN or infinity (with row and
    column), a scale that the scale dtype can't hold (with the group, and a dtype that can), k that is not whole blocks,
    and importance that is negative, not finite or all 0.
    """
    parsed = parse(format)
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight is a {type(weight).__name__}; it must be a torch.Tensor")
    if nested_offset is not None and not isinstance(nested_offset, Tensor):
        nested_offset = torch.tensor([nested_offset], dtype=torch.float32, device=weight.device)
    planes = _ops.encode(weight.detach(), parsed.canonical, nested_offset, clamp, importance)
    n, k = weight.shape
    return QTensor(parsed.canonical, (n, k), _named(parsed, planes))


def pack(
    codes: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    *,
    format: str,
    nested_scales: Tensor | None = None,
    nested_offset: Tensor | None = None,
    layout: str = "rows",
    g_idx: Tensor | None = None,
) -> QTensor:
    """Packs logical codes, scales and zeros (`Unpacked` has their shapes and dtypes); the inverse of
    `QTensor.unpack`. g_idx: of which group each column of the codes is, as in `QTensor`.

    Raises ValueError where one of them is missing, unwanted, or of another shape, dtype or range than the
    format says.
    """
    parsed = parse(format)
    check_layout(layout)
    if codes.dim() != 2:
        raise ValueError(f"codes has shape {list(codes.shape)}; it must have 2 dimensions")
    n, k = codes.shape
    if layout == "flat":
        codes = codes.reshape(1, -1)
    if g_idx is not None:
        check_g_idx(g_idx, parsed, k, layout, codes.device)
        codes = codes.index_select(1, column_order(g_idx))
    nested = [plane for plane in (nested_scales, nested_offset) if plane is not None]
    planes = _ops.pack(codes.detach(), scales, zeros, parsed.canonical, nested)
    return QTensor(parsed.canonical, (n, k), _named(parsed, planes), layout, g_idx)


def _named(format: Format, planes: Sequence[Tensor]) -> dict[str, Tensor]:
    return {law.name: plane for law, plane in zip(format.planes, planes, strict=True)}


def check_activations(activations: str, format: str) -> None:
    """Raises ValueError unless `format` can be multiplied with activations of that kind: "float" or "int8"."""
    plan_linear(format, 1, 1, 1, activations=activations)


def linear(x: Tensor, qtensor: QTensor, bias: Tensor | None = None, *, activations: str = "float") -> Tensor:
    """x @ W^T + bias, computed on the packed weights with fp32 accumulation (float64 for float64 x).

    x: [..., k], float32, float16, bfloat16 or float64, any strides; bias: [n] of x's dtype. Returns [..., n]
    of x's dtype. Differentiable with respect to x and bias; under autocast x and bias are cast as F.linear
    casts them.

    activations: "float" multiplies x as it is. "int8", with GGUF's block formats, rounds each block of x to 8 bits
    first and multiplies whole numbers, as llama.cpp does (docs/gguf-blocks.md, "Activations of 8 bits"): faster, at
    a relative error of about 0.7 %. With int8 weights that have one scale a row, or one for the matrix, each row of x
    is rounded instead (docs/activations.md). A row of x with a NaN or an infinity then gives NaN in that row alone. The
    gradient with respect to x is that of the product with "float": the rounding counts as if it were not there.

    Raises ValueError for "int8" with another format, and other activations, which a QuantLinear has.
    """
    n, k = qtensor.shape
    by_rows = activations == INT8.kind and parse(qtensor.format).grid != "block"
    if by_rows:
        INT8.check(qtensor.format)
        if qtensor.layout != "rows":
            raise ValueError("activations is 'int8', and the weight's blocks run across its rows")
    if qtensor.g_idx is not None:
        x = gather_columns(x, column_order(qtensor.g_idx))
    planes = list(qtensor.planes.values())
    if by_rows:
        return ops_int8.linear_int8(x, planes, qtensor.format, n, k, bias, INT8)
    return ops.linear(x, planes, qtensor.format, n, k, bias, qtensor.layout, activations)


def gather_columns(x: Tensor, order: Tensor) -> Tensor:
    """x [..., k] with its columns in the order of the planes: once, in front of a product with a matrix that has g_idx.

    Raises ValueError where x has another number of columns.
    """
    if x.dim() == 0 or x.shape[-1] != len(order):
        raise ValueError(
            f"x has shape {list(x.shape)}; its last dimension must be {len(order)}, the columns of the weight"
        )
    return x.index_select(-1, order)


def embedding(ids: Tensor, qtensor: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` of the matrix, decoded: int64 or int32 [...] -> [..., k] of `dtype`.

    Raises ValueError for an id outside [0, n).
    """
    n, k = qtensor.shape
    rows = _ops.embedding(ids, list(qtensor.planes.values()), qtensor.format, n, k, dtype, qtensor.layout)
    if qtensor.g_idx is None:
        return rows
    return rows.index_select(-1, torch.argsort(column_order(qtensor.g_idx)))


@dataclass(frozen=True)
class LinearPlan:
    """What `linear` runs: a function of format, layout, sizes, dtype and device (plan.hpp of csrc/cpu and csrc/cuda).

    regime: "fused", "tiled" or "floor", on a GPU "rows", "tile", "wgmma", "matmul" or "floor"; reason: why that one;
    operands: the dtype that activations and decoded weights have when they are multiplied ("bfloat16" and "float16"
    round the weights, "float32" and "float64" don't; "int8" and "int16" round the activations, block by block); isa:
    the instruction set that runs it, or "cuda".
    """

    regime: str
    reason: str
    operands: str
    isa: str


def _capability(device: torch.device | str) -> int:
    """Of a CUDA device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def plan_linear(
    format: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "rows",
    activations: str = "float",
) -> LinearPlan:
    """The kernel for an [m, k] x of `dtype` and an [n, k] matrix in `format`; runs nothing, and needs no GPU for a
    plan on "cuda": where there is none, it is that of an H100.

    Raises ValueError for a device that has no kernels, and activations that the format can't be multiplied with there:
    "int8" is GGUF's blocks' alone here, for linear_int8 has no plans to choose from.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be 'cpu' or 'cuda': no other has kernels")
    return LinearPlan(
        **_C.plan_linear(
            parse(format).canonical,
            layout,
            m,
            n,
            k,
            str(dtype).removeprefix("torch."),
            activations,
            _capability(device) if kind == "cuda" else 0,
        )
    )
