"""How many instructions the CUDA kernels' inner loops have.

    python tests/cuda/kernel_counts.py <folder of CUDA's bin> <library or cubin>

prints the tables of docs/cuda.md: an inner loop's instructions for so many weights, and what the busiest unit of a
multiprocessor needs for them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from machine_code import Instruction, Kernel, by_warpgroups, count, is_few, read, waits

# Instructions that the integer unit runs; the others go to the units of floating point, memory or branches.
INTEGER = {"LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "IMNMX", "VIADDMNMX", "PLOP3", "P2R", "R2P",
           "FSETP", "FSEL", "SGXT", "BREV", "FMNMX", "F2FP"}  # fmt: skip
# A loop of the kernels for few rows: its kernel, which of its loops, the format that takes it, bits of a weight (with
# scales in blocks), and steps of mma for minima.
LOOPS = [
    ("PlaneFragments<4, 64, 1>", "Plain", "int8-channel", 8, 0),
    ("PlaneFragments<4, 64, 1>", "Full", "int8-channel-asym", 8, 0),
    ("PlaneFragments<2, 64, 1>", "Plain", "fp8-e4m3-channel", 8, 0),
    ("PlaneFragments<3, 64, 1>", "Plain", "fp8-e5m2-channel", 8, 0),
    ("PlaneFragments<5, 256, 2>", "Plain", "int4-g128", 4, 0),
    ("PlaneFragments<5, 256, 2>", "Full", "int4-g128-asym", 4, 0),
    ("PlaneFragments<5, 128, 1>", "Plain", "int4-channel", 4, 0),
    ("PlaneFragments<5, 128, 2>", "Plain", "int4-g64", 4, 0),
    ("PlaneFragments<5, 128, 2>", "Full", "int4-g64-asym", 4, 0),
    ("PlaneFragments<5, 128, 4>", "Plain", "int4-g32", 4, 0),
    ("PlaneFragments<8, 256, 4>", "Plain", "nf4-b64, fp4-b64", 4, 0),
    ("PlaneFragments<8, 256, 4>", "Full", "nf4-b64-dq", 4, 0),
    ("PlaneFragments<6, 64, 1>", "Plain", "int3-g64", 3, 0),
    ("PlaneFragments<6, 64, 1>", "Full", "int3-g64-asym", 3, 0),
    ("PlaneFragments<7, 128, 2>", "Plain", "int2-g64", 2, 0),
    ("PlaneFragments<7, 128, 1>", "Plain", "int2-g128", 2, 0),
    ("ChunkFragments<10>", "Any", "q4_0", 4.5, 0),
    ("KFragments<15>", "Any", "q2_k", 2.625, 2),
    ("KFragments<16>", "Any", "q3_k", 3.4375, 2),
    ("KFragments<17>", "Any", "q4_k", 4.5, 1),
    ("KFragments<18>", "Any", "q5_k", 5.5, 1),
    ("KFragments<19>", "Any", "q6_k", 6.5625, 2),
    ("KFragments<21>", "Any", "iq4_xs", 4.25, 1),
    ("ChunkFragments<22>", "Any", "mxfp4", 4.25, 0),
]
# Scales come to two numbers at a time by these, with minima or without.
SCALED = {"HMUL2", "HFMA2"}
# Kernels for more rows with wgmma: their rows of the format table.
WGMMAS = [(4, "int8"), (5, "int4"), (6, "int3"), (8, "nf4"), (10, "q4_0"), (11, "q4_1"), (17, "q4_k"), (21, "iq4_xs"),
          (19, "q6_k")]  # fmt: skip
# Those for 9 to 32 rows of x on Hopper: the rows of the format table, and the scales of a row in 128 columns that are
# handed round; blocks have theirs in shared memory.
FEWS = [
    (5, 1, "int4-g128"),
    (8, 2, "nf4-b64"),
    (10, 0, "q4_0"),
    (17, 0, "q4_k"),
    (21, 0, "iq4_xs"),
    (19, 0, "q6_k"),
]


@dataclass(frozen=True)
class Loop:
    """A loop of the kernel for few rows, for 512 bytes of codes of a tile of 16 rows."""

    format: str
    columns: int  # of a piece
    instructions: float
    integer: float
    shared: float  # wavefronts
    mma: float

    @property
    def clocks(self) -> float:
        """Of a multiprocessor, if nothing but its busiest unit counts."""
        return max(self.instructions / 4, self.integer / 2, self.shared, self.mma / 0.62)

    @property
    def share(self) -> float:
        """Of the clocks in which 4.3 TB/s bring 512 bytes to each of 132 multiprocessors at 1.8 GHz."""
        return self.clocks / (512 * 132 * 1.8e9 / 4.3e12)


def loop(kernels: list[Kernel], name: str, manner: str, format: str, bits: float, minima: int) -> Loop:
    """bits: of a weight; minima: steps of mma beside those of 256 columns."""
    (kernel,) = (k for k in kernels if k.name.replace(" >", ">") == f"linear_rows_kernel<{name}>")
    # The less a loop asks about the matrix the shorter it is.
    loops = sorted(kernel.inner_loops("HMMA"), key=lambda loop: len(loop) / count(loop)["HMMA"])
    code = usual_piece(loops[("Plain", "Full").index(manner) if manner != "Any" else -1])
    counts = count(code)
    part = counts["HMMA"] * 16 / (16 + minima) * 32 * bits / 512
    shared = sum(4 if "128" in i.code.split(".") else 2 if "64" in i.code.split(".") else 1
                 for i in code if i.name in ("LDS", "LDSM", "SHFL"))  # fmt: skip
    return Loop(format, columns(kernel) or 256, len(code) / part,
                sum(counts[name] for name in INTEGER) / part, shared / part, counts["HMMA"] / part)  # fmt: skip


def usual_piece(loop: list[Instruction]) -> list[Instruction]:
    """The shortest way through a loop for few rows with all its products and a whole piece's copies: without what goes
    on to another unit (what is copied then comes before a piece), and without the ends of rows."""
    copies: list[list[int]] = [[]]  # between two jumps, those of 16 bytes
    for at, i in enumerate(loop):
        if i.name in ("BRA", "BSSY", "BSYNC"):
            copies.append([])
        elif is_copy(i) and "128" in i.code.split("."):
            copies[-1].append(at)
    first = min(max(copies, key=len), default=len(loop))
    needed = [i.name == "HMMA" or (at >= first and is_copy(i)) for at, i in enumerate(loop)]
    return shortest_way(loop, needed)


def is_copy(i: Instruction) -> bool:
    return i.name == "LDGSTS" and "ZFILL" not in i.code.split(".")


def columns(kernel: Kernel) -> int | None:
    """Columns of a piece of a kernel for few rows of a format with planes."""
    match = re.fullmatch(r"linear_rows_kernel<PlaneFragments<\d+, (\d+), \d+>\s?>", kernel.name)
    return int(match[1]) if match else None


def print_table(head: str, rows: list[tuple[object, ...]]) -> None:
    names = head.split(", ")
    for row in [names, ["---"] * len(names), *rows]:
        print("|", " | ".join(map(str, row)), "|")
    print()


def print_loops(kernels: list[Kernel]) -> None:
    """The tables of docs/cuda.md."""
    rows: list[tuple[object, ...]] = []
    for name, manner, format, bits, minima in LOOPS:
        one = loop(kernels, name, manner, format, bits, minima)
        counts = (f"{count:.0f}" for count in (one.instructions, one.integer, one.shared, one.mma))
        rows.append((format, one.columns, *counts, f"{one.clocks:.1f}", f"{one.share:.0%}"))
    print_table(
        "format, columns of a piece, instructions, integer unit, shared memory, mma, clocks, share", rows
    )
    print_table("format, rows of x, instructions, mma, FFMA, loads from shared memory, everything else",
                list(few_rows(kernels)))  # fmt: skip
    print_table("format, rows of x, instructions, HGMMA, HMUL2 and HFMA2, loads from shared memory, everything else, "
                "clocks of products, clocks of instructions", list(wgmma_rows(kernels)))  # fmt: skip


def few_rows(kernels: list[Kernel]) -> Iterator[tuple[object, ...]]:
    """Of a warp's 32 rows of W and 128 columns of a stage."""
    for row, scales, format in FEWS:
        found = [k for k in kernels if k.name == f"linear_tile_kernel<{row}>" and is_few(k)]
        counted = [(len(loop), count(loop)) for k in found for loop in k.inner_loops("HMMA")]
        for m in (16, 32):
            # Of 128 columns, and minima; the less a loop asks about the matrix the shorter it is.
            of_m = [(length, c) for length, c in counted if 2 * m <= c["HMMA"] <= 3 * m]
            handed = [(length, c) for length, c in of_m if scales < 2 or c["SHFL"] >= 4 * scales]
            for length, c in sorted(handed, key=lambda of: of[0])[:1]:
                parts = [c["HMMA"], c["FFMA"], c["LDS"] + c["LDSM"]]
                yield (format, m, length, *parts, length - sum(parts))


def wgmma_rows(kernels: list[Kernel]) -> Iterator[tuple[object, ...]]:
    """Of a unit of 64 columns, for 64 and 128 rows of x; clocks of all of a multiprocessor's warpgroups. Without what
    opens a chunk, every second or fourth unit, its minima, and changes of powers of two."""
    for row, format in WGMMAS:
        names = (f"linear_tile_kernel<{row}>", f"linear_many_kernel<{row}>")
        found = [k for k in kernels if k.name in names and by_warpgroups(k)]
        ways = [usual_way(loop) for k in found for loop in k.inner_loops("HGMMA")]  # of two units
        for quarters, warpgroups in ((1, 4), (2, 3)):
            of_quarters = [
                way for way in ways if count(way)["HGMMA"] == 2 * 4 * quarters and waits(way, 1) == 2
            ]
            if not of_quarters:
                continue
            way = min(of_quarters, key=len)
            parts = [c // 2 for c in (count(way)["HGMMA"], scaled(way), count(way)["LDS"])]
            instructions = len(way) // 2
            rest = instructions - sum(parts)
            products, issued = 128 * quarters * warpgroups, instructions * warpgroups
            yield format, 64 * quarters, instructions, *parts, rest, products, issued


def usual_way(loop: list[Instruction]) -> list[Instruction]:
    """The shortest way through a loop that decodes two units, which means many of SCALED near one another."""
    for reach in (24, 48, 96):
        way = shortest_way(loop, near_others(loop, reach))
        if scaled(way) >= 2 * 16:
            return way
    return []


def scaled(way: list[Instruction]) -> int:
    return sum(i.name in SCALED for i in way)


def near_others(loop: list[Instruction], reach: int) -> list[bool]:
    """Which are of SCALED and have eleven others among so many instructions before and behind them."""
    halves = [i.name in SCALED for i in loop]
    return [halves[at] and sum(halves[max(at - reach, 0) : at + reach + 1]) >= 12 for at in range(len(loop))]


def shortest_way(loop: list[Instruction], needed: list[bool]) -> list[Instruction]:
    """Through a loop, past all that are needed."""
    place = {i.address: at for at, i in enumerate(loop)}
    shortest: list[list[Instruction] | None] = [None] * len(loop) + [[]]
    for at, i in reversed(list(enumerate(loop))):
        ways = []
        target = re.search(r"0x([0-9a-f]+)$", i.operands) if i.name == "BRA" else None
        to = place.get(int(target[1], 16)) if target else None
        if to is not None and to > at and not any(needed[at:to]):
            ways.append(shortest[to])
        # The last goes back to the first.
        if target is None or i.guard or "," in i.operands or at + 1 == len(loop):
            ways.append(shortest[at + 1])
        ways = [way for way in ways if way is not None]
        shortest[at] = [i, *min(ways, key=len)] if ways else None
    return shortest[0] or []


if __name__ == "__main__":
    print_loops(read(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()))
