"""What a quantized layer does with its input before it multiplies (docs/activations.md).

An axis of its own, beside the format of the weight: recipes, modules, checkpoints and plans pass an `Activations`
around, and store it as its canonical string.

    float           the input as it is
    int8            rounded to 8 bits, with a step for each row (W8A8); with GGUF's blocks one for each block of a row
    int8-static     rounded to 8 bits, with one step that calibration found (`x_scale`)
    llm-int8        int8, but for the columns in which some value reaches the threshold: these stay in 16 bits
    fp8             rounded to 8-bit floats (e4m3), with a scale for each row
    fp8-static      rounded to 8-bit floats, with one scale that calibration found (`x_scale`); what is beyond saturates

"llm-int8" has options, in this order: "-t5" for a threshold other than 6, "-rows" for rows that don't share their
outliers, "-exact" for a 16-bit copy of the weight's usual outlier columns (`outlier_columns`, `outlier_weight`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from bitfold.formats import Format, parse

THRESHOLD = 6.0
"""From which on a value is an outlier (Dettmers et al. 2022, section 3.2)."""
COPIED = 32
"""A layer has a 16-bit copy of at most one of so many columns of its weight."""


@dataclass(frozen=True)
class Kind:
    """One way to treat activations. families: of the formats whose weights can be multiplied so, () for all; groups:
    of these formats, None for all ("channel" and "tensor": one scale for a row, or for the matrix); blocks: whether
    GGUF's blocks can too; is_static: whether a step from calibration goes with the layer; format: of the weights where
    a recipe names the kind alone, "" where it can't; says: what it is, in a few words; largest: of static ones the
    number that the largest input of the calibration text becomes; op: that multiplies weights with planes."""

    families: tuple[str, ...]
    groups: tuple[int, ...] | None
    blocks: bool
    is_static: bool
    format: str
    says: str
    largest: float = 0.0
    op: str = "linear_int8"


_CHANNEL, _TENSOR = -1, 0

KINDS: dict[str, Kind] = {
    "float": Kind((), None, True, False, "", "inputs as they are", op="linear"),
    "int8": Kind(("int8",), (_CHANNEL, _TENSOR), True, False, "", "inputs rounded to 8 bits, row by row"),
    "int8-static": Kind(
        ("int8",),
        (_CHANNEL, _TENSOR),
        False,
        True,
        "",
        "inputs rounded to 8 bits, with a calibrated step",
        127,
    ),
    "llm-int8": Kind(
        ("int8",),
        (_CHANNEL, _TENSOR),
        False,
        False,
        "int8-channel-sfp32",
        "inputs rounded to 8 bits, but for columns with outliers, which stay in 16",
    ),
    "fp8": Kind((), None, False, False, "", "inputs rounded to 8-bit floats, row by row", op="linear_fp8"),
    "fp8-static": Kind(
        (),
        None,
        False,
        True,
        "",
        "inputs rounded to 8-bit floats, with a calibrated scale",
        448,
        "linear_fp8",
    ),
}
_LLM_INT8 = re.compile(r"llm-int8(?:-t(?P<threshold>.+?))?(?P<rows>-rows)?(?P<exact>-exact)?")


@dataclass(frozen=True)
class Activations:
    """What a layer does with its input; str() is the canonical string, and `read` its inverse.

    kind: of KINDS. threshold, per_row, exact_outliers: of "llm-int8" alone (elsewhere 0 and False): from which absolute
    value on an input is an outlier; whether a row's outliers are its own, and not those of all rows of the call;
    whether the layer has a 16-bit copy of its usual outlier columns.

    Raises ValueError for another kind, for a threshold that is not above 0 and finite, and for options of another kind.
    """

    kind: str = "float"
    threshold: float = 0.0
    per_row: bool = False
    exact_outliers: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"the kind of activations is {self.kind!r}; it must be one of {', '.join(KINDS)}"
            )
        if self.kind != "llm-int8":
            if self.threshold or self.per_row or self.exact_outliers:
                raise ValueError(
                    f"activations {self.kind!r} have an option of outliers; only 'llm-int8' has them"
                )
        elif not 0 < self.threshold < math.inf:
            raise ValueError(
                f"threshold is {self.threshold}; it must be a number above 0 (plain int8 is 'int8')"
            )

    def __str__(self) -> str:
        if self.kind != "llm-int8":
            return self.kind
        threshold = "" if self.threshold == THRESHOLD else f"-t{self.threshold:g}"
        if threshold and float(threshold[2:]) != self.threshold:
            threshold = f"-t{self.threshold!r}"
        return f"llm-int8{threshold}{'-rows' * self.per_row}{'-exact' * self.exact_outliers}"

    @property
    def is_float(self) -> bool:
        """Whether the input is multiplied as it is."""
        return self.kind == "float"

    @property
    def is_static(self) -> bool:
        """Whether the step of the input is known beforehand, and kept with the layer."""
        return KINDS[self.kind].is_static

    @property
    def needs_calibration(self) -> bool:
        """Whether a layer can't be made so from its weight alone."""
        return self.is_static or self.exact_outliers

    @property
    def op(self) -> str:
        """The op of torch.ops.bitfold that multiplies so; with GGUF's blocks it is `linear` whatever they are."""
        return KINDS[self.kind].op

    @property
    def gains(self) -> bool:
        """Whether a text to calibrate on adds something: needed, or a copy of the weight's usual outlier columns."""
        return self.is_static or self.kind == "llm-int8"

    def having(self, *, step: bool = False, outliers: bool = False) -> Activations:
        """What of this a layer does that has a calibrated step, or a copy of outlier columns, or hasn't: without a step
        static activations become those with a step for each row."""
        if self.is_static and not step:
            return Activations(self.kind.removesuffix("-static"))
        return dataclasses.replace(self, exact_outliers=outliers) if self.kind == "llm-int8" else self

    @property
    def says(self) -> str:
        """What it is, in a few words."""
        return KINDS[self.kind].says

    def fits(self, format: Format) -> bool:
        """Whether weights in `format` can be multiplied so."""
        kind = KINDS[self.kind]
        if format.grid == "block":
            return kind.blocks
        return not kind.families or (
            format.family in kind.families and (kind.groups is None or format.group in kind.groups)
        )

    def check(self, format: str) -> None:
        """Raises ValueError unless weights in `format` can be multiplied so."""
        parsed = parse(format)
        if self.fits(parsed):
            return
        kind = KINDS[self.kind]
        wanted = [f"{family} with one scale for each row, as {family}-channel" for family in kind.families]
        wanted += ["one of GGUF's blocks"] if kind.blocks else []
        wanted = wanted or ["one with planes, as fp8-e4m3-channel"]
        raise ValueError(
            f"activations is '{self}', and the weight is {parsed}; it must be {', or '.join(wanted)}, or the "
            "activations 'float'"
        )


FLOAT = Activations()


def llm_int8(
    threshold: float | None = THRESHOLD, *, per_row: bool = False, exact_outliers: bool = False
) -> Activations:
    """LLM.int8() with a threshold; 0 or None: plain int8, as in bitsandbytes.

    Raises ValueError for a threshold that is negative or no number.
    """
    if not threshold:
        return Activations("int8")
    return Activations("llm-int8", float(threshold), per_row, exact_outliers)


def read(text: str | Activations) -> Activations:
    """The activations that `text` spells.

    Raises ValueError where it spells none, and for a threshold that can't be.
    """
    if isinstance(text, Activations):
        return text
    if text in KINDS and text != "llm-int8":
        return Activations(text)
    match = _LLM_INT8.fullmatch(text)
    if match is None:
        raise ValueError(f"activations is '{text}'; it must be one of {', '.join(KINDS)}")
    try:
        threshold = THRESHOLD if match["threshold"] is None else float(match["threshold"])
    except ValueError:
        raise ValueError(
            f"activations is '{text}', whose threshold is '{match['threshold']}'; it must be a number, as in "
            "'llm-int8-t6'"
        ) from None
    return llm_int8(threshold, per_row=match["rows"] is not None, exact_outliers=match["exact"] is not None)
