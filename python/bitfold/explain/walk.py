"""A few numbers rounded step by step: divide by the scale, round, clamp to the codes there are, decode.

The first scheme is the plainest that one can think of, and clumsy: the scale is chosen as if the codes began at
the smallest number, but nothing shifts them there. The others are what the library does to the same numbers.
Arithmetic is binary32, codes and decoded values are the library's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.formats import FORMATS
from bitfold.qtensor import encode, pack


@dataclass(frozen=True)
class Step:
    """One number: quotient is number / scale, rounded the nearest integer (plus the zero point, where there is
    one), code what is left of it within the codes there are."""

    number: float
    scale: float
    zero: int | None
    quotient: float
    rounded: int
    code: int
    decoded: float
    error: float


@dataclass(frozen=True)
class Scheme:
    """One way to round: its name, how its scale comes about, the range of its codes, and the steps."""

    name: str
    scale_rule: str
    lowest: int
    highest: int
    steps: tuple[Step, ...]

    @property
    def largest_error(self) -> float:
        return max(abs(step.error) for step in self.steps)


def walk(numbers: list[float], bits: int = 8, group: int | None = None) -> list[Scheme]:
    """The numbers through four schemes: one plain scale, a zero point, the largest magnitude, a scale for each
    group.

    bits: of a code, those of an integer format; group: numbers that share a scale in the last scheme (None: half of
    them).

    Raises ValueError where there are less than two different finite numbers, bits has no format, or group is below
    1.
    """
    families = [name for name, format in FORMATS.items() if format.grid == "integer"]
    if f"int{bits}" not in families:
        choices = ", ".join(name.removeprefix("int") for name in families)
        raise ValueError(f"bits is {bits}; it must be one of {choices}")
    weight = torch.tensor(numbers, dtype=torch.float32)
    if not weight.isfinite().all() or len(weight.unique()) < 2:
        raise ValueError(
            f"the numbers are {', '.join(f'{number:g}' for number in numbers)}; "
            "they must be finite and not all the same"
        )
    if group is None:
        group = max(1, len(numbers) // 2)
    if group < 1:
        raise ValueError(f"group is {group}; it must be at least 1")
    return [
        _plain(numbers, bits),
        _asymmetric(numbers, bits),
        _symmetric(numbers, bits, len(numbers), "one scale, from the largest magnitude"),
        _symmetric(numbers, bits, group, f"a scale for every {group} numbers"),
    ]


def _plain(numbers: list[float], bits: int) -> Scheme:
    """scale = (max - min) / (2^bits - 1), no zero point."""
    weight = torch.tensor(numbers, dtype=torch.float32)
    half = 1 << (bits - 1)
    scale = (weight.max() - weight.min()) / ((1 << bits) - 1)
    quotient = weight / scale
    rounded = quotient.round()
    codes = rounded.clamp(-half, half - 1)
    stored = (codes + half).to(torch.uint8)[None]
    decoded = pack(stored, scale.reshape(1, 1), format=f"int{bits}-tensor-sfp32").decode()[0]
    rule = f"(max - min) / {(1 << bits) - 1} = {float(scale):.6g}"
    steps = _steps(numbers, scale.expand(len(weight)), None, quotient, rounded, codes, decoded)
    return Scheme("one scale for all, from max - min", rule, -half, half - 1, steps)


def _asymmetric(numbers: list[float], bits: int) -> Scheme:
    weight = torch.tensor(numbers, dtype=torch.float32)
    qtensor = encode(weight[None], f"int{bits}-tensor-asym-sfp32")
    unpacked = qtensor.unpack()
    assert unpacked.scales is not None
    assert unpacked.zeros is not None
    scale, zero = unpacked.scales.expand(len(weight), 1)[:, 0], int(unpacked.zeros[0, 0])
    quotient = weight / scale
    rounded = quotient.round() + zero
    # The range always takes 0 in, so that 0 is stored exactly.
    rule = f"(max - min, 0 counted in) / {(1 << bits) - 1} = {float(scale[0]):.6g}; the code of 0 is {zero}"
    steps = _steps(numbers, scale, zero, quotient, rounded, unpacked.codes[0], qtensor.decode()[0])
    return Scheme("the same with a zero point", rule, 0, (1 << bits) - 1, steps)


def _symmetric(numbers: list[float], bits: int, group: int, name: str) -> Scheme:
    half = 1 << (bits - 1)
    steps: list[Step] = []
    scales = []
    for start in range(0, len(numbers), group):
        part = torch.tensor(numbers[start : start + group], dtype=torch.float32)
        qtensor = encode(part[None], f"int{bits}-tensor-sfp32")
        unpacked = qtensor.unpack()
        assert unpacked.scales is not None
        scale = unpacked.scales.expand(len(part), 1)[:, 0]
        # A group of zeros has the scale 0.
        quotient = torch.where(scale == 0, 0.0, part / scale)
        codes = unpacked.codes[0].to(torch.int32) - half
        chosen = numbers[start : start + group]
        steps += _steps(chosen, scale, None, quotient, quotient.round(), codes, qtensor.decode()[0])
        scales.append(float(scale[0]))
    rule = f"largest magnitude / {half - 1} = {', '.join(f'{scale:.6g}' for scale in scales)}"
    return Scheme(name, rule, -half, half - 1, tuple(steps))


def _steps(
    numbers: list[float],
    scales: Tensor,
    zero: int | None,
    quotient: Tensor,
    rounded: Tensor,
    codes: Tensor,
    decoded: Tensor,
) -> tuple[Step, ...]:
    columns = (scales, quotient, rounded, codes, decoded)
    return tuple(
        Step(
            number=number,
            scale=scale,
            zero=zero,
            quotient=ratio,
            rounded=int(whole),
            code=int(code),
            decoded=value,
            error=value - number,
        )
        for number, scale, ratio, whole, code, value in zip(
            numbers, *(column.tolist() for column in columns), strict=True
        )
    )
