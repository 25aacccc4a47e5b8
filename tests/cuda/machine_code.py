"""What the compiler made of the CUDA kernels: the instructions in their libraries, and how many their inner loops have.

    python tests/cuda/machine_code.py <folder of CUDA's bin> <library or cubin>

prints the tables of docs/cuda.md: an inner loop's instructions for so many weights, and what the busiest unit of a
multiprocessor needs for them. `faults` is the list of what must be there and isn't, or must not be and is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    address: int
    code: str  # with all that follows its name: LDG.E.128.CONSTANT
    operands: str
    guard: str = ""  # the predicate before it

    @property
    def name(self) -> str:
        return self.code.split(".")[0]


@dataclass
class Kernel:
    """Registers of a thread, and bytes of its stack, where spilled registers are, and arrays if there are any."""

    name: str
    registers: int = 0
    stack: int = 0
    code: list[Instruction] = field(default_factory=list)

    def has(self, name: str, *parts: str) -> bool:
        return any(i.name == name and set(parts) <= set(i.code.split(".")) for i in self.code)

    def inner_loops(self, name: str) -> list[list[Instruction]]:
        """Loops with instructions `name` that have no smaller such loop inside, in the order of their addresses."""
        found: list[tuple[int, int]] = []
        ends = [(int(i.operands.split("0x")[-1], 16), i.address) for i in self.code if is_jump_back(i)]
        for first, last in sorted(ends, key=lambda ends: ends[1] - ends[0]):
            if any(first <= a and b <= last for a, b in found):
                continue
            if any(i.name == name for i in self.between(first, last)):
                found.append((first, last))
        return [self.between(first, last) for first, last in sorted(found)]

    def bytes_of(self, name: str) -> int:
        """Of a thread that go through all instructions `name`: STL and LDL are the stack's."""
        widths = ((128, 16), (64, 8), (16, 2), (8, 1))
        return sum(
            next((size for bits, size in widths if re.search(rf"\.[US]?{bits}(\.|$)", i.code)), 4)
            for i in self.code
            if i.name == name
        )

    def between(self, first: int, last: int) -> list[Instruction]:
        return [i for i in self.code if first <= i.address <= last and i.name != "NOP"]


def is_jump_back(i: Instruction) -> bool:
    match = re.search(r"0x([0-9a-f]+)$", i.operands) if i.name == "BRA" else None
    return match is not None and int(match[1], 16) < i.address


def members(library: Path, folder: Path) -> list[Path]:
    """A static library's objects with device code, put into `folder`: the disassembler has one core for a file."""
    if library.suffix != ".a":
        return [library]
    names = subprocess.run(["ar", "t", library], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["ar", "x", library.absolute()], check=True, cwd=folder)
    return [folder / name for name in names if name.endswith(".cu.o")]


def read(bin: Path, library: Path) -> list[Kernel]:
    """The kernels in `library`, for the first of its architectures where there are several."""
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}

    def cuobjdump(option: str, file: Path) -> str:
        command = [bin / "cuobjdump", option, file]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = members(library, Path(folder))
        dumps = "\n".join(pool.map(lambda file: cuobjdump("-sass", file), objects))
    found: dict[str, Kernel] = {}
    kernel = Kernel("")
    for line in dumps.split("\n"):
        if match := re.match(r"\s*Function : (\S+)", line):
            kernel = Kernel(match[1])
            found.setdefault(match[1], kernel)
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            guard, code, operands = match[2] or "", match[3], match[4].strip()
            kernel.code.append(Instruction(int(match[1], 16), code, operands, guard))
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("--dump-resource-usage", library)
    )
    for name, registers, stack in usage:
        if name in found and found[name].registers == 0:
            found[name].registers, found[name].stack = int(registers), int(stack)
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for kernel, name in zip(found.values(), names, strict=False):
        kernel.name = re.sub(
            r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|bitfold::(cuda::(rows::)?)?", "", name
        )
    return sorted(found.values(), key=lambda kernel: kernel.name)


# ---- what must be there ----


def faults(kernels: list[Kernel]) -> list[str]:
    """Sentences about kernels that lack the instructions that they are made for, or use memory in their loops."""
    said = []
    for kernel in kernels:
        for test, sentence in EXPECTED:
            said += [f"{kernel.name}: {sentence}"] if not test(kernel) else []
    if any(is_wgmma(kernel) for kernel in kernels):
        said += [f"{k.name}: it isn't Hopper's" for k in kernels if is_tile(k) and not is_few(k)]
    if any(kernel.has("ACQBULK") for kernel in kernels):
        said += [f"{k.name}: it doesn't wait for the kernel ahead" for k in kernels
                 if k.name.startswith(EARLY) and not k.has("ACQBULK")]  # fmt: skip
    if not any(kernel.name.startswith("linear_rows") for kernel in kernels):
        said.append("there is no kernel for few rows")
    return said


def columns(kernel: Kernel) -> int | None:
    """Columns of a piece of a kernel for few rows of a format with planes."""
    match = re.fullmatch(r"linear_rows_kernel<PlaneFragments<\d+, (\d+), \d+>\s?>", kernel.name)
    return int(match[1]) if match else None


def is_rows(kernel: Kernel) -> bool:
    return kernel.name.startswith("linear_rows_kernel")


def is_tile(kernel: Kernel) -> bool:
    return kernel.name.startswith("linear_tile_kernel")


def is_few(kernel: Kernel) -> bool:
    """Of the two codes for few rows that which is Hopper's (at most 64): those who copy leave registers to others."""
    return is_tile(kernel) and kernel.has("USETMAXREG")


def is_many(kernel: Kernel) -> bool:
    return kernel.name.startswith("linear_many_kernel")


def is_wgmma(kernel: Kernel) -> bool:
    """Of the two codes for many rows that which is Hopper's: it has no products of single warps."""
    return is_many(kernel) and not kernel.has("HMMA")


def by_warpgroups(kernel: Kernel) -> bool:
    """Whether 33 rows of x and more are multiplied by wgmma."""
    return is_wgmma(kernel) or is_few(kernel)


def copied(kernel: Kernel) -> str:
    """How many bits of packed bytes an asynchronous copy takes to shared memory; none where codes are read one by one.
    A piece of int3 is 24 bytes."""
    if is_rows(kernel) and "RaggedFragments" in kernel.name:
        return ""
    if is_rows(kernel) and "PlaneFragments<6," in kernel.name:
        return "64"
    return "128" if is_rows(kernel) or is_tile(kernel) or is_many(kernel) else ""


def is_gptq(kernel: Kernel) -> bool:
    return kernel.name.startswith("gptq_columns_kernel")


def is_int8(kernel: Kernel) -> bool:
    return kernel.name.startswith(("int8_rows_kernel", "int8_tile_kernel"))


def is_int8_by_boxes(kernel: Kernel) -> bool:
    """Of the two codes for more than 8 rows that which is Hopper's."""
    return kernel.name.startswith("int8_tile_kernel") and not kernel.has("IMMA")


# Kernels that may begin before the one ahead of them has ended, on Hopper and later: ACQBULK is their wait for it, and
# PREEXIT lets others begin.
EARLY = ("linear_rows", "rows_sums", "arrange", "linear_tile", "linear_many", "int8_")


def waits_first(kernel: Kernel) -> bool:
    """Whether global memory is touched, and others may begin, behind the wait alone. (A branch may wait earlier.) W and
    its scales may come before where the kernel ahead writes x alone: with warpgroups, and of int8."""
    waits = [i.address for i in kernel.code if i.name == "ACQBULK"]
    w_first = by_warpgroups(kernel) or is_int8(kernel)
    names = {"STG", "UBLKCP", "PREEXIT"} | (set() if w_first else {"LDG", "LDGSTS"})
    touches = [i.address for i in kernel.code if i.name in names]
    return not waits or min(waits) < min(touches)


# Kernels whose time is worth every register. (A search that encodes, or the floor, may keep arrays in memory.)
FAST = (
    "linear_rows",
    "linear_tile",
    "linear_many",
    "arrange",
    "int8_",
    "decode",
    "kv_",
    "gptq_columns",
    "search_steps",
)


# Bytes of stack of those that keep a register or two there all the same, outside of their inner loops.
SPILLED = {"linear_tile_kernel<5>": 8, "linear_tile_kernel<11>": 8}
# Hopper's for 9 to 64 rows keep some: in loops for 32 rows of x, where sums, operands and fresh sums are 96 of a
# thread's 112 registers; of int2, int3, int4 and nf4 in those for small groups with zero points or nested scales, of
# int4 also for 16 rows; and where such scales are brought to those who multiply by wgmma, whose own loops keep none.
MOST_FEW = {2: 16, 3: 16, 4: 8, 5: 80, 6: 48, 7: 88, 8: 24, 11: 8, 13: 8, 15: 32, 18: 8, 21: 8, 22: 8}
SPILLED_FEW = {f"linear_tile_kernel<{row}>": most for row, most in MOST_FEW.items()}
# Kernels for 9 to 32 rows of formats with planes, but int3, whose codes lie across words.
BY_MATRICES = [f"linear_tile_kernel<{row}>" for row in (2, 3, 4, 5, 7, 8)]


def spills(kernel: Kernel) -> bool:
    known = SPILLED_FEW if is_few(kernel) else SPILLED
    if kernel.name in known:
        return kernel.stack > known[kernel.name]
    return kernel.stack > 0 or kernel.has("STL") or kernel.has("LDL")


def products_of_a_load(kernel: Kernel) -> float:
    """From shared memory, in the kernel's first loop with products of floats."""
    loops = kernel.inner_loops("FFMA")
    counts = count(loops[0]) if loops else Counter(LDS=1)
    return counts["FFMA"] / counts["LDS"]


def waits(loop: list[Instruction], left: int) -> int:
    """How often a loop waits until a warpgroup has so many groups of products on their way."""
    return sum(i.code.startswith("WARPGROUP.DEPBAR") and i.operands.endswith(f"0x{left}") for i in loop)


# A property of a kernel, and what is to be said where it doesn't hold.
EXPECTED = [
    (lambda k: not k.name.startswith(FAST) or not spills(k), "it has a stack: registers are spilled"),
    (lambda k: not (is_rows(k) or is_tile(k) or (is_many(k) and not is_wgmma(k))) or k.has("HMMA", "16816", "F32"),
     "no products of halves with fp32 sums"),
    (lambda k: not by_warpgroups(k) or k.has("HGMMA", "64x64x16", "F32"), "no products of warpgroups with fp32 sums"),
    (lambda k: not by_warpgroups(k)
     or all(re.match(r"R\d+, R\d+, gdesc", i.operands) for i in k.code if i.name == "HGMMA"),
     "products of warpgroups don't take W from registers"),
    # For all products of two units only where a row's power of two changes, and at the end, whose code may lie between;
    # more often where the compiler couldn't tell their registers from others'.
    (lambda k: not by_warpgroups(k) or all(waits(loop, 0) <= 3 for loop in k.inner_loops("HGMMA")),
     "products of warpgroups are waited for one by one"),
    (lambda k: not by_warpgroups(k) or not any(count(loop)["FFMA"] for loop in k.inner_loops("HGMMA")),
     "sums of products are scaled"),
    (lambda k: not is_wgmma(k) or k.has("UBLKCP"), "no bulk copies"),
    # kAtStart of wgmma.hpp: with others a block's warpgroups would wait for registers that aren't there.
    (lambda k: not is_wgmma(k) or (k.registers == 128 and k.has("USETMAXREG")), "it doesn't begin with 128 registers"),
    (lambda k: not is_few(k) or k.has("UBLKCP"), "no bulk copies"),
    # kFewAtStart of few.hpp, and kAtStart
    (lambda k: not is_few(k) or k.registers == 96, "it doesn't begin with 96 registers"),
    (lambda k: not is_few(k) or k.name not in BY_MATRICES or k.has("LDSM", "4"), "no words of W by ldmatrix"),
    (lambda k: not copied(k) or k.has("LDGSTS", copied(k)), "no asynchronous copies of 16 bytes (int3: 8)"),
    (lambda k: not k.name.startswith("linear_rows_kernel<PlaneFragments<5,") or k.has("LOP3", "LUT"),
     "codes aren't taken apart by LOP3"),
    (lambda k: not k.name.startswith("linear_rows_kernel<PlaneFragments<8,") or k.has("PRMT"),
     "a codebook's places aren't put together by PRMT"),
    (lambda k: not k.name.startswith("decode_kernel") or k.has("STG", "128"), "no stores of 16 bytes"),
    (lambda k: not is_gptq(k) or k.has("LDGSTS"), "no asynchronous copies"),
    (lambda k: not is_gptq(k) or products_of_a_load(k) >= 3,
     "loads from shared memory serve fewer than three products"),
    (lambda k: not is_int8(k) or is_int8_by_boxes(k) or k.has("IMMA", "16832", "S8"), "no products of bytes"),
    (lambda k: not is_int8(k) or is_int8_by_boxes(k) or k.has("LDGSTS", "128"),
     "no asynchronous copies of 16 bytes"),
    (lambda k: not is_int8_by_boxes(k) or (k.has("IGMMA", "U8", "S8") and k.has("UTMALDG", "2D")),
     "no products of warpgroups with bytes that come by boxes"),
    (waits_first, "it touches global memory before it waits for the kernel ahead"),
    (lambda k: not (k.has("ACQBULK") and k.has("LDG", "128", "CONSTANT")),
     "it reads what an earlier kernel writes as what nobody does"),
    (lambda k: not (is_rows(k) or is_tile(k) or is_many(k)) or not k.has("ATOMG", "ADD", "F32"),
     "sums are added by atomics"),
]  # fmt: skip


def complaints(said: str) -> list[str]:
    """What ptxas says of wgmma that it couldn't compile as it was written (waits put in, products one after another),
    and of setmaxnreg that it left out: remarks C7500 to C7599, which are no warnings."""
    return re.findall(r"^ptxas info\s*: (\(C75\d\d\) .*)$", said, re.MULTILINE)


# ---- how many ----

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
    ("Q4KFragments", "Any", "q4_k", 4.5, 1),
    ("ChunkFragments<10>", "Any", "q4_0", 4.5, 0),
    ("ChunkFragments<19>", "Any", "q6_k", 6.5625, 0),
]
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
    code = loops[("Plain", "Full").index(manner) if manner != "Any" else -1]
    counts = count(code)
    part = counts["HMMA"] * 16 / (16 + minima) * 32 * bits / 512
    shared = sum(4 if "128" in i.code.split(".") else 2 if "64" in i.code.split(".") else 1
                 for i in code if i.name in ("LDS", "LDSM", "SHFL"))  # fmt: skip
    return Loop(format, columns(kernel) or 256, len(code) / part,
                sum(counts[name] for name in INTEGER) / part, shared / part, counts["HMMA"] / part)  # fmt: skip


def count(loop: list[Instruction]) -> Counter[str]:
    return Counter(i.name for i in loop)


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
    print_table("format, rows of x, instructions, HGMMA, HMUL2, loads from shared memory, everything else, "
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
            parts = [count(way)[name] // 2 for name in ("HGMMA", "HMUL2", "LDS")]
            instructions = len(way) // 2
            rest = instructions - sum(parts)
            products, issued = 128 * quarters * warpgroups, instructions * warpgroups
            yield format, 64 * quarters, instructions, *parts, rest, products, issued


def usual_way(loop: list[Instruction]) -> list[Instruction]:
    """The shortest way through a loop that decodes two units, which means many HMUL2 near one another."""
    for reach in (24, 48, 96):
        way = shortest_way(loop, reach)
        if count(way)["HMUL2"] >= 2 * 16:
            return way
    return []


def shortest_way(loop: list[Instruction], reach: int) -> list[Instruction]:
    """Past every HMUL2 that has eleven others among so many instructions before and behind it."""
    halves = [i.name == "HMUL2" for i in loop]
    needed = [
        halves[at] and sum(halves[max(at - reach, 0) : at + reach + 1]) >= 12 for at in range(len(loop))
    ]
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
    KERNELS = read(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
    print_loops(KERNELS)
    print("\n".join(faults(KERNELS)) or "all instructions are there")
