"""The machine code of the CUDA kernels: what is in their libraries, and of which kind a kernel is.

`kernel_faults.py` says what must be there and isn't, or must not be and is; `kernel_counts.py` how many instructions
inner loops have; `load_waits.py` what they wait for soon after they have asked for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    address: int
    code: str  # with all that follows its name: LDG.E.128.CONSTANT
    operands: str
    guard: str = ""  # the predicate before it
    # Which of six counters it uses, and for which it waits (Jia et al. 2018, arXiv:1804.06826, section 2.1).
    control: int = 0x7E0

    @property
    def name(self) -> str:
        return self.code.split(".")[0]

    @property
    def counter(self) -> int | None:
        """That of those whose results come later: up until then."""
        number = self.control >> 5 & 7
        return number if number < 6 else None

    def waits_for(self, counter: int) -> bool:
        return bool(self.control >> 11 + counter & 1)


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
        elif kernel.code and (match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/$", line)):
            kernel.code[-1] = replace(kernel.code[-1], control=int(match[1], 16) >> 41)
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


# ---- kinds of kernels ----


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


# ---- loops ----


def count(loop: list[Instruction]) -> Counter[str]:
    return Counter(i.name for i in loop)


def waits(loop: list[Instruction], left: int) -> int:
    """How often a loop waits until a warpgroup has so many groups of products on their way."""
    return sum(i.code.startswith("WARPGROUP.DEPBAR") and i.operands.endswith(f"0x{left}") for i in loop)
