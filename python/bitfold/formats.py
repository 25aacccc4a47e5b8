"""Formats as Python sees them: a mirror of the table in csrc/formats/format.hpp, with its size laws as plain
numbers.

The laws are numbers, not calls, so that sizes may be symbolic: a native size function inside a fake kernel
would pin torch.compile to one size without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitfold import _C

LAYOUTS = ("rows", "flat")


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@dataclass(frozen=True)
class PlaneLaw:
    """Dtype and size of one plane (`PlaneLaw` of csrc/formats/format.hpp).

    A row has ceil(k / per) entries of `bits` bits each (per = 0: one entry), stored in elements of `unit`
    bits. rows_per rows of the matrix have one row in the plane, with 0 all of them. nested_per > 0: a vector with
    one element for so many entries of the matrix.
    """

    name: str
    dtype: torch.dtype
    rows_per: int
    per: int
    bits: int
    unit: int
    nested_per: int

    def logical_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the unpacked plane: one element for each entry."""
        rows = ceil_div(n, self.rows_per) if self.rows_per > 0 else 1
        entries = ceil_div(k, self.per) if self.per > 0 else 1
        if self.nested_per > 0:
            return (ceil_div(rows * entries, self.nested_per),)
        return (rows, entries)

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the stored plane of an n x k matrix."""
        logical = self.logical_shape(n, k)
        return logical if self.nested_per > 0 else (logical[0], ceil_div(logical[1] * self.bits, self.unit))


@dataclass(frozen=True)
class Format:
    """One weight format: a row of the table and its parameters (docs/formats.md).

    grid: "cast", "minifloat", "integer", "codebook" or "block"; bits: of one code; group: columns of a group
    (of a block), 0 for one scale a matrix, -1 for one a row; group_rows: rows that share their scales; scale:
    "none", "fp16", "bf16", "fp32" or "nested";
    planes: in the order that every op takes.
    """

    canonical: str
    family: str
    grid: str
    bits: int
    group: int
    group_rows: int
    asymmetric: bool
    scale: str
    planes: tuple[PlaneLaw, ...]

    def __str__(self) -> str:
        return self.canonical

    def check_columns(self, k: int) -> None:
        """Raises ValueError where k columns are not whole blocks."""
        if self.grid == "block" and k % self.group:
            raise ValueError(f"k is {k}; for {self} it must be a multiple of {self.group}")


_parsed: dict[str, Format] = {}


def parse(text: str) -> Format:
    """The format that `text` spells, short forms included ("int4" is "int4-g128").

    Raises ValueError, with near matches, where no format is spelled so.
    """
    # A dict and no functools.cache: torch.compile traces a look-up, and calls of C++ not at all.
    if text not in _parsed:
        _parsed[text] = _parse(text)
    return _parsed[text]


def _parse(text: str) -> Format:
    fields = _C.parse_format(text)
    planes = [law | {"dtype": getattr(torch, law["dtype"])} for law in fields.pop("planes")]
    return Format(planes=tuple(PlaneLaw(**law) for law in planes), **fields)


def floating_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name, as "float16". Raises ValueError where there is none of floating-point numbers."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"the dtype is '{name}'; it must be a floating-point dtype of torch")
    return dtype


def check_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is one of LAYOUTS."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")


def plane_size(n: int, k: int, layout: str = "rows") -> tuple[int, int]:
    """Rows and columns as the planes see them: a flat matrix is one row of n * k columns."""
    return (1, n * k) if layout == "flat" else (n, k)


def plane_shapes(format: Format | str, n: int, k: int, layout: str = "rows") -> dict[str, tuple[int, ...]]:
    """Shape of every plane of an n x k matrix, by name, in the order of the format."""
    laws = (parse(format) if isinstance(format, str) else format).planes
    return {law.name: law.shape(*plane_size(n, k, layout)) for law in laws}


def stored_bytes(format: Format | str, n: int, k: int, layout: str = "rows") -> int:
    """Bytes of all planes of an n x k matrix."""
    laws = (parse(format) if isinstance(format, str) else format).planes
    total = 0
    for law in laws:
        elements = 1
        for size in law.shape(*plane_size(n, k, layout)):
            elements *= size
        total += elements * law.dtype.itemsize
    return total


FORMATS: dict[str, Format] = {row["family"]: parse(row["default"]) for row in _C.families()}
"""The default format of every family, by family name."""
