"""The bars that bitfold is held to: a table, and the verdicts that rows of a run give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitfold.bench.ggml import BLOCK_TYPES

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """A bar holds for every row of `op` that `where` picks, whose name is in `names`.

    measure: a key of Row, "share:CEILING" or "over" (speed over the fastest of the contestants `against[name]` of
    the same case). wanted: its least value, or with at_most its largest.
    """

    text: str
    op: str
    names: tuple[str, ...]
    measure: str
    wanted: float
    at_most: bool = False
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: Callable[[Row], bool] = lambda row: True


FOUR_BITS = ("int4-g128", "int4-g128-asym", "nf4", "nf4-dq", "fp4")
ENCODERS = ("int8", "int4-g128", "nf4", "fp4")


def _at(dtype: str, low: int, high: int | None = None) -> Callable[[Row], bool]:
    return lambda row: row["dtype"] == dtype and low <= row["m"] <= (high or low)


BARS = (
    Bar(
        "int4-g128 at m=1 over aten's int4 kernel",
        "linear",
        ("int4-g128",),
        "over",
        1.2,
        against={"int4-g128": ("aten int4pack g128",)},
        where=_at("bf16", 1),
    ),
    Bar(
        "int4-g128 at m=1, share of the read bandwidth",
        "linear",
        ("int4-g128",),
        "share:read",
        0.7,
        where=_at("bf16", 1),
    ),
    Bar(
        "nf4 and nf4-dq at m=1 over bitsandbytes' Linear4bit",
        "linear",
        ("nf4", "nf4-dq"),
        "over",
        1.5,
        against={"nf4": ("bitsandbytes nf4",), "nf4-dq": ("bitsandbytes nf4 nested",)},
        where=_at("bf16", 1),
    ),
    Bar(
        "int8 at m=1 over aten's int8 kernel",
        "linear",
        ("int8",),
        "over",
        1.5,
        against={"int8": ("aten int8pack",)},
        where=_at("bf16", 1),
    ),
    Bar("4 bits at m=8 over torch bf16", "linear", FOUR_BITS, "over_torch", 1.5, where=_at("bf16", 8)),
    Bar("4 bits at m=128 over torch bf16", "linear", FOUR_BITS, "over_torch", 1.0, where=_at("bf16", 128)),
    Bar("4 bits at m=1024 over torch bf16", "linear", FOUR_BITS, "over_torch", 0.95, where=_at("bf16", 1024)),
    Bar(
        "fp32 activations at m of 1 to 32 over torch fp32",
        "linear",
        ("int8", *FOUR_BITS),
        "over_torch",
        1.0,
        where=_at("fp32", 1, 32),
    ),
    Bar(
        "fp32 activations above m=32 over torch fp32",
        "linear",
        ("int8", *FOUR_BITS),
        "over_torch",
        0.9,
        where=_at("fp32", 33, 1 << 30),
    ),
    Bar("encode, weights per second and core", "encode", ENCODERS, "weights_per_s_per_core", 300e6),
    Bar(
        "decode, share of the copy bandwidth into fresh memory",
        "decode",
        ENCODERS,
        "share:copy, fresh",
        0.6,
    ),
    Bar("import bitfold beside torch's import, ms", "import", ("bitfold",), "ms", 300, at_most=True),
    Bar(
        "generate at batch 1 over its linear layers alone",
        "generate",
        ("int4-g128", "nf4"),
        "over_linears",
        1.2,
        at_most=True,
    ),
)


# ---- GGUF's block formats beside llama.cpp ----

LONG_SEARCH = (
    "q2_k",
    "q4_k",
    "q5_k",
    "iq4_nl",
    "iq4_xs",
)  # over scale and minimum, or over a table's entries
SHORT_SEARCH = ("q3_k", "q6_k")
LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1")  # search only with importance
PRODUCTS = ("q4_k", "q6_k", "q8_0")


def _rows(m: int) -> Callable[[Row], bool]:
    return lambda row: row["m"] == m


def _llama(names: tuple[str, ...], suffix: str = "") -> dict[str, tuple[str, ...]]:
    return {name + suffix: (f"llama.cpp {name}", f"llama.cpp {name} repacked") for name in names}


def _coding(text: str, op: str, names: tuple[str, ...], wanted: float) -> Bar:
    return Bar(text, op, names, "over", wanted, against=_llama(names))


BLOCK_BARS = (
    _coding("encode over llama.cpp, long searches", "encode", LONG_SEARCH, 8.0),
    _coding("encode over llama.cpp, short searches", "encode", SHORT_SEARCH, 4.0),
    _coding("with importance over llama.cpp, long searches", "importance", LONG_SEARCH, 8.0),
    _coding("with importance over llama.cpp, short searches", "importance", SHORT_SEARCH, 4.0),
    _coding("with importance over llama.cpp, blocks of 32", "importance", LEGACY, 4.0),
    Bar(
        "encode without a search, share of the copy bandwidth",
        "encode",
        ("q4_0", "q8_0"),
        "share:copy, existing",
        0.6,
    ),
    _coding("decode over llama.cpp", "decode", BLOCK_TYPES, 1.2),
    Bar("decode, weights per second and core", "decode", BLOCK_TYPES, "weights_per_s_per_core", 3e9),
    *(
        Bar(
            f"{kind} at m={m} over llama.cpp's fastest",
            "linear",
            tuple(name + suffix for name in PRODUCTS),
            "over",
            wanted,
            against=_llama(PRODUCTS, suffix),
            where=_rows(m),
        )
        for kind, suffix, m, wanted in (
            ("activations as they are", "", 1, 0.8),
            ("activations of 8 bits", " int8", 1, 1.0),
            ("activations as they are", "", 128, 1.0),
            ("activations of 8 bits", " int8", 128, 1.0),
        )
    ),
)

# Of bench/gguf_file.py.
FILE_BARS = (
    Bar(
        "a whole GGUF over llama-quantize",
        "quantize a file",
        ("bitfold",),
        "over",
        6.0,
        against={"bitfold": ("llama-quantize",)},
    ),
    Bar(
        "a whole GGUF, peak of anonymous memory in bytes",
        "quantize a file",
        ("bitfold",),
        "peak_anon",
        1e9,
        at_most=True,
    ),
)


# ---- one H200, 8192 x 28672, bf16 activations ----

GPU_FOUR_BITS = (*FOUR_BITS, "q4_k")


def _gpu_linear(m: int, measure: str, wanted: float, what: str) -> Bar:
    return Bar(f"4 bits at m={m}, {what}", "linear", GPU_FOUR_BITS, measure, wanted, where=_at("bf16", m))


_OF_FEWER = "share of the gain that their fewer bytes allow over torch bf16"
GPU_BARS = (
    Bar("decode, share of the copy bandwidth", "decode", GPU_FOUR_BITS, "share:copy", 0.85),
    _gpu_linear(1, "share:copy", 0.85, "share of the copy bandwidth over packed bytes"),
    _gpu_linear(1, "of_fewer_bytes", 0.85, _OF_FEWER),
    _gpu_linear(16, "of_fewer_bytes", 0.75, _OF_FEWER),
    *(
        _gpu_linear(m, "over_torch", wanted, "over torch bf16")
        for m, wanted in ((64, 1.8), (128, 0.9), (256, 0.65), (1024, 0.75), (4096, 0.92))
    ),
    Bar(
        "LLM.int8() over torch bf16",
        "int8",
        ("int8 llm-int8",),
        "over_torch",
        1.0,
        where=_at("bf16", 1, 1 << 30),
    ),
    Bar(
        "LLM.int8() at m=4096 over torch bf16",
        "int8",
        ("int8 llm-int8",),
        "over_torch",
        1.4,
        where=_at("bf16", 4096),
    ),
    Bar(
        "keys and values of 8 bits over 16 bits, 32768 tokens",
        "kv",
        ("kv int8",),
        "over",
        1.6,
        against={"kv int8": ("torch bf16", "torch bf16, heads as rows")},
        where=_at("bf16", 32768),
    ),
)


def verdicts(rows: Iterable[Row], bars: Iterable[Bar] = BARS) -> list[dict[str, Any]]:
    """One dict for each bar: bar, wanted, sense, measured (the worst), met, at (where that was), cases (all).

    measured and met are None where no row of the run belongs to the bar; `why` says what is missing.
    """
    rows = list(rows)
    return [_verdict(bar, rows) for bar in bars]


def _verdict(bar: Bar, rows: list[Row]) -> dict[str, Any]:
    subjects = [row for row in rows if row["op"] == bar.op and row["name"] in bar.names and bar.where(row)]
    found = [(_measure(bar, row, rows), where(row)) for row in subjects]
    values = [(value, place) for value, place in found if value is not None]
    result: dict[str, Any] = {
        "bar": bar.text,
        "wanted": bar.wanted,
        "sense": "at most" if bar.at_most else "at least",
        "measured": None,
        "met": None,
        "at": None,
        "cases": [{"at": place, "measured": value} for value, place in values],
    }
    if not values:
        missing = [name for rivals in bar.against.values() for name in rivals] if subjects else bar.names
        return {**result, "why": f"not measured in this run: {', '.join(missing)}"}
    worst, place = (max if bar.at_most else min)(values)
    met = worst <= bar.wanted if bar.at_most else worst >= bar.wanted
    return {**result, "measured": worst, "met": met, "at": place}


def _measure(bar: Bar, row: Row, rows: list[Row]) -> float | None:
    kind, _, name = bar.measure.partition(":")
    if kind == "ms":
        return row["ms"]["median"]
    if kind == "share":
        return row["shares"][name]
    if kind != "over":
        return row[kind]
    rivals = bar.against[row["name"]]
    same_case = [other for other in rows if other["name"] in rivals and case_of(other) == case_of(row)]
    fastest = min((other["ms"]["median"] for other in same_case), default=None)
    return None if fastest is None else fastest / row["ms"]["median"]


def case_of(row: Row) -> tuple[Any, ...]:
    """What contestants of one case have in common."""
    return tuple(row.get(name) for name in ("op", "n", "k", "m", "dtype"))


def where(row: Row) -> str:
    """A row as text: "int4-g128 linear 4096x4096 m=1 bf16"."""
    parts = [row["name"], row["op"]]
    parts += [f"{row['n']}x{row['k']}"] if row.get("n") else []
    parts += [f"m={row['m']}"] if row.get("m") else []
    parts += [row["dtype"]] if row.get("dtype") else []
    return " ".join(parts)


# Of bench/gguf_generate.py, over the faster of llama.cpp's two ways.
GENERATE_BARS = (
    Bar(
        "generate from a GGUF over llama.cpp", "generate", ("bitfold fp32", "bitfold bf16"), "over_llama", 0.8
    ),
)
