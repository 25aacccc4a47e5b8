"""docs/formats.md tells the truth: its tables are the table of the code, its worked examples are what encode gives.

`python tests/test_docs_formats.py` prints the section "Worked examples" anew.
"""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

import numpy as np
import oracle
import oracle_encode

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
HEADING = "## Worked examples"
PLANE_TYPES = {"uint8": np.uint8, "float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


def ramp(count: int, step: int = 37) -> list[float]:
    """Numbers between -2 and 2 that both decimals and binary32 hold exactly."""
    return [((i * step + 11) % 64 - 32) / 16 for i in range(count)]


# format -> weight: ragged tails, ties, zeros of both signs, a group of zeros
EXAMPLES = {
    "fp16": [[1.0, -0.0, 0.1, 65504.0, 1e-7]],
    "bf16": [[1.0, -0.0, 0.1, 65504.0, 1e-39]],
    "fp8-e4m3-g16": [[*ramp(16), 0.5, -0.0, 0.001]],
    "fp8-e4m3-b2x16": [[*ramp(16), 0.5], [*ramp(16, 5), -0.25], [*ramp(16, 23), -0.0]],
    "fp8-e5m2-channel": [[1.75, -0.875, -0.0, 0.1, 1e-6]],
    "int8-channel": [[1.0, -0.5, 0.25, 0.0, -0.0078125], [0.0, 0.0, 0.0, 0.0, 0.0]],
    "int8-tensor-asym": [[1.0, -0.5, 0.25], [0.0, 3.0, -0.0078125]],
    "int4-g16": [[*ramp(16), 7.0, -3.5, 2.5]],
    "int4-g16-asym": [[*ramp(16), 3.0, 1.0, -1.5], [*ramp(16, 5), 0.0, 0.0, 0.0]],
    "int3-g16-asym": [[*ramp(16), 7.0, 2.5, 0.0]],
    "int2-g16-sbf16": [[*ramp(16, 23), 1.0, 0.5, -0.5]],
    "nf4-b32": [[*ramp(32), -0.5, 0.25, 0.0]],
    "nf4-b32-dq": [[*ramp(32), -0.5, 0.25, 0.0], [*ramp(32, 5), 3.0, 0.25, 0.0]],
    "fp4-b32": [[*ramp(32), -0.5, 0.001, -0.001]],
}


def words(array: np.ndarray) -> list[str]:
    """The bytes of each element, in the order in which they lie in memory, two hex digits a byte."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
    return [element.tobytes().hex() for element in little.reshape(-1)]


def wrapped(tokens: list[str], per_line: int = 16) -> list[str]:
    return ["  " + " ".join(tokens[i : i + per_line]) for i in range(0, len(tokens), per_line)]


def example(text: str) -> str:
    """One worked example as it stands on the page, from the oracle."""
    weight = np.array(EXAMPLES[text], np.float32)
    n, k = weight.shape
    lines = [f"format {text}", f"weight {n} x {k}"]
    for row in EXAMPLES[text]:
        lines += wrapped([f"{value:g}" for value in row])
    for (name, (dtype, shape)), plane in zip(
        oracle.plane_shapes(text, n, k).items(), oracle_encode.encode(weight, text).values(), strict=True
    ):
        lines.append(f"{name} {dtype} {' x '.join(map(str, shape))}")
        for row in np.atleast_2d(plane):
            lines += wrapped(words(row))
    return "\n".join(lines)


def section() -> str:
    intro = (
        f"{HEADING}\n\n"
        "Written by `python tests/test_docs_formats.py`. A row of the matrix, and of a plane, starts on a new line;\n"
        "planes in hex, byte for byte as they lie in memory, an element of several bytes in one word.\n"
    )
    return intro + "".join(f"\n```text\n{example(text)}\n```\n" for text in EXAMPLES)


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def tables() -> dict[str, list[dict[str, str]]]:
    """Heading -> rows of the first table under it, by column."""
    found: dict[str, list[dict[str, str]]] = {}
    heading, columns = "", None
    for line in page().splitlines():
        if line.startswith("#"):
            heading, columns = line.lstrip("# "), None
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if columns is None and heading not in found:
                columns, found[heading] = cells, []
            elif columns and not set(line) <= set("|- "):
                found[heading].append(dict(zip(columns, cells, strict=True)))
    return found


def parse_examples() -> list[dict]:
    """The examples on the page: format, weight [n, k] float32, planes as bits in their shapes."""
    examples = []
    for block in re.findall(r"```text\n(format .*?)```", page().partition(HEADING)[2], re.S):
        chunks: list[tuple[str, list[str]]] = []
        for line in block.splitlines():
            if line.startswith("  "):
                chunks[-1][1].extend(line.split())
            else:
                chunks.append((line, []))
        (head, _), (size, values), *planes = chunks
        n, k = map(int, re.fullmatch(r"weight (\d+) x (\d+)", size).groups())
        example = {
            "format": head.removeprefix("format "),
            "weight": np.array([float(value) for value in values], np.float32).reshape(n, k),
            "planes": {},
        }
        for title, hexes in planes:
            name, dtype, shape = title.split(" ", 2)
            raw = np.frombuffer(bytes.fromhex("".join(hexes)), np.dtype(PLANE_TYPES[dtype]).newbyteorder("<"))
            sizes = tuple(int(size) for size in shape.split(" x "))
            example["planes"][name] = raw.astype(PLANE_TYPES[dtype]).reshape(sizes)
        examples.append(example)
    return examples


def test_families_table():
    from cases import plane_families

    rows = {row["family"].strip("`"): row for row in tables()["Families"]}
    assert list(rows) == [row["family"] for row in plane_families()]
    for ours in plane_families():
        row = rows[ours["family"]]
        assert row["grid"] == ours["grid"]
        assert int(row["bits"]) == ours["bits"]
        assert row["default"].strip("`") == ours["default"]
        assert np.float32(float(row["largest grid value"])) == np.float32(ours["grid_max"])
        assert row["default scale dtype"] == ours["scale"]
        assert row["asym"] == ("yes" if ours["asymmetric"] else "no")
        assert row["dq"] == ("yes" if ours["nested"] else "no")
        if ours["grid"] == "cast":
            expected = "none"
        elif ours["group_letter"] == "b":
            expected = f"b{ours['min_group']} to b{ours['max_group']}"
        else:
            expected = f"tensor, channel, g{ours['min_group']} and up"
            expected += f", b2x{ours['min_group']} and up" if ours["tall"] else ""
        assert row["granularity"] == expected


def test_blocks_table():
    from bitfold.formats import parse
    from cases import block_formats

    rows = {row["family"].strip("`"): row for row in tables()["Blocks"]}
    assert list(rows) == block_formats()
    for family, row in rows.items():
        format = parse(family)
        assert (int(row["columns"]), int(row["code bits"])) == (format.group, format.bits)
        assert int(row["bytes"]) * 8 == format.planes[0].bits
        assert float(row["bits per weight"]) == 8 * int(row["bytes"]) / format.group


def test_planes_table():
    """The size formulas of the page, evaluated, are the sizes of the code."""
    from bitfold.formats import parse, plane_shapes
    from cases import every_format

    applies = {
        "cast families": lambda f: f.grid == "cast",
        "all others, b bits each": lambda f: f.grid != "cast",
        "granularity `tensor`": lambda f: f.grid != "cast" and f.group == 0 and f.scale != "nested",
        "granularity `b<R>x<N>`": lambda f: f.group_rows > 1,
        "other granularities": lambda f: (
            f.grid != "cast" and f.group != 0 and f.scale != "nested" and f.group_rows == 1
        ),
        "`dq`": lambda f: f.scale == "nested",
        "`asym`, `tensor`, b bits each": lambda f: f.asymmetric and f.group == 0,
        "`asym`, other granularities": lambda f: f.asymmetric and f.group != 0,
    }
    scale_dtypes = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    rows = tables()["Planes"]
    assert {row["where"] for row in rows} == set(applies)
    for text in every_format():
        format = parse(text)
        for n, k in [(1, 1), (3, 35), (5, 257), (0, 4), (4, 0)]:
            groups = ceil(k / format.group) if format.group > 0 else 1
            names = {"n": n, "k": k, "b": format.bits, "G": groups, "R": format.group_rows, "ceil": ceil}
            expected, dtypes = {}, {}
            for row in rows:
                if applies[row["where"]](format):
                    plane = row["plane"].strip("`")
                    expected[plane] = tuple(eval(row["shape"], {"__builtins__": {}}, names))
                    dtypes[plane] = row["dtype"]
            assert plane_shapes(text, n, k) == expected, text
        for law in format.planes:
            wanted = dtypes[law.name].replace("scale dtype", scale_dtypes.get(format.scale, ""))
            if format.grid == "cast":
                wanted = {"fp16": "float16", "bf16": "bfloat16"}[format.family]
            assert str(law.dtype) == f"torch.{wanted}", text


def test_codebooks():
    """The values on the page are what codes 0 to 15 decode to at scale 1."""
    import bitfold
    import torch

    text = page()
    nf4 = re.search(r"codes 0 to 15:\n([-0-9., \n]+)\.\n", text).group(1)
    fp4 = re.search(r"codes 0 to 7: ([-0-9., ]+);", text).group(1)
    half = [float(value) for value in fp4.split(",")]
    values = {
        "nf4": [float(value) for value in nf4.split(",")],
        "fp4": half + [0.0] + [-value for value in half[1:]],
    }
    for family, expected in values.items():
        codes = torch.arange(16, dtype=torch.uint8)[None]
        decoded = bitfold.pack(codes, torch.ones(1, 1), format=f"{family}-b32").decode()
        assert decoded.tolist() == [torch.tensor(expected).tolist()]


def test_worked_examples_are_the_oracles():
    """Shows too that the oracle has not drifted from the page: the page is compared as text."""
    assert {oracle.parse(example["format"]).family for example in parse_examples()} == set(oracle.FAMILIES)
    assert section() in page()


def test_worked_examples_are_what_encode_gives():
    import bitfold
    import torch
    from cases import assert_planes, assert_same_bits, to_qtensor

    for example in parse_examples():
        weight = torch.from_numpy(example["weight"])
        encoded = bitfold.encode(weight, example["format"])
        assert_planes(encoded, example["planes"], example["format"])
        stored = to_qtensor(example["planes"], example["format"], *weight.shape)
        decoded = oracle.decode(example["planes"], example["format"], *weight.shape)
        assert_same_bits(stored.decode(), decoded.view(np.uint32), example["format"])


if __name__ == "__main__":
    print(section(), end="")
