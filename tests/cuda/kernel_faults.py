"""What is wrong with the CUDA kernels' machine code: instructions that must be there, registers that are in memory."""

from __future__ import annotations

import re
from collections import Counter

from machine_code import Kernel, by_warpgroups, count, is_few, is_many, is_rows, is_tile, is_wgmma, waits


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


# Bytes of stack of those that keep some registers there all the same: sm_80's, for up to 32 rows of x.
SPILLED = {f"linear_tile_kernel<{row}>": most for row, most in {13: 24, 14: 8, 17: 24, 18: 24}.items()}
# Hopper's for 9 to 64 rows keep some: in loops for 32 rows of x, where sums, operands and fresh sums are 96 of a
# thread's 112 registers, of int2, int3 and int4 with zero points; of int2 and int4 in those for small groups with them
# also for 16 rows; and where such scales are brought to those who multiply by wgmma, whose own loops keep none.
MOST_FEW = {4: 8, 5: 64, 6: 40, 7: 80, 8: 8, 13: 8, 15: 8, 18: 8}
SPILLED_FEW = {f"linear_tile_kernel<{row}>": most for row, most in MOST_FEW.items()}
# How many of their loops over stages have something from there: for it a warp waited 670 clocks of an H200 at each
# stage, longer than for all else (int4-g128 with 16 rows at f4ebc17). None for usual scales without zero points, none
# for nested ones, none of blocks.
MOST_LOOPS_FEW = {5: 3, 6: 2, 7: 3}
# Kernels for 9 to 32 rows of formats with planes, but int3, whose codes lie across words.
BY_MATRICES = [f"linear_tile_kernel<{row}>" for row in (2, 3, 4, 5, 7, 8)]


def spills(kernel: Kernel) -> bool:
    known = SPILLED_FEW if is_few(kernel) else SPILLED
    if kernel.name in known:
        return kernel.stack > known[kernel.name]
    return kernel.stack > 0 or kernel.has("STL") or kernel.has("LDL")


def waits_for_stack(kernel: Kernel) -> bool:
    # (A jump back from code that lies behind all loops makes one of many thousand instructions.)
    loops = sum(count(loop)["LDL"] > 0 for loop in kernel.inner_loops("HMMA") if len(loop) < 2000)
    row = re.fullmatch(r"linear_tile_kernel<(\d+)>", kernel.name)
    return row is not None and loops > MOST_LOOPS_FEW.get(int(row[1]), 0)


def products_of_a_load(kernel: Kernel) -> float:
    """From shared memory, in the kernel's first loop with products of floats."""
    loops = kernel.inner_loops("FFMA")
    counts = count(loops[0]) if loops else Counter(LDS=1)
    return counts["FFMA"] / counts["LDS"]


# A property of a kernel, and what is to be said where it doesn't hold.
EXPECTED = [
    (lambda k: not k.name.startswith(FAST) or not spills(k), "it has a stack: registers are spilled"),
    (lambda k: not is_few(k) or not waits_for_stack(k), "more of its loops load from a stack"),
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
