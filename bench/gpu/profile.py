"""What Nsight Compute saw of kernels, as a text to keep: what they took, what warps waited for, and where.

    ncu --profile-from-start off --clock-control none --set full -o out python bench/gpu/calls.py linear:int4-g128:16
    ncu -i out.ncu-rep --page details > details.txt
    ncu -i out.ncu-rep --page source --print-source sass --csv > source.csv
    python bench/gpu/profile.py details.txt source.csv [--least PERCENT]

Of each kernel its time and, where that is longer than its multiprocessors had warps for, how much: blocks that take
longer than the others, or begin late. Then its machine code, in parts that are executed equally often: how often by a
warp of the launch, which share of the samples, and why warps waited there. Parts with less than --least per cent of a
kernel's samples are left out.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

WARP = 32
NUMBERS = {
    "Duration": "microseconds",
    "DRAM Throughput": "per cent of DRAM",
    "Registers Per Thread": "registers",
    "Achieved Active Warps Per SM": "warps a multiprocessor",
    "One or More Eligible": "per cent of cycles with a warp that can issue",
}
STALL = "stall_"
AS_OFTEN = 0.02  # executions that differ by less are of one part
GAP = 40  # instructions that nobody executes, at most, within a part
REASONS = 4  # of a part


@dataclass
class Kernel:
    """What the details page says: its name, blocks and threads of each, and numbers by their names there."""

    name: str
    blocks: int
    threads: int
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def warps(self) -> int:
        return self.blocks * -(-self.threads // WARP)


class Instruction(NamedTuple):
    place: int
    executed: int  # by warps
    samples: int
    stalls: dict[str, int]  # samples by reason


def kernels(lines: Iterable[str]) -> list[Kernel]:
    """Of a details page."""
    found: list[Kernel] = []
    for line in lines:
        if head := re.match(r"  (\S.*) \((\d+), (\d+), (\d+)\)x\((\d+), (\d+), (\d+)\), Context", line):
            name, *sizes = head.groups()
            x, y, z, *threads = map(int, sizes)
            found.append(Kernel(name, x * y * z, threads[0] * threads[1] * threads[2]))
        elif found and (row := re.match(r"    (\S(?:.*?\S)?)\s{2,}\S*\s+([\d,.]+)\s*$", line)):
            found[-1].numbers.setdefault(row[1], float(row[2].replace(",", "")))
    return found


def sources(rows: Iterable[list[str]]) -> Iterator[list[Instruction]]:
    """Of a source page as CSV, kernel by kernel: the instructions that were executed."""
    head: list[str] = []
    code: list[Instruction] | None = None
    place = 0
    for row in rows:
        if not row:
            continue
        if row[0] == "Kernel Name":
            if code is not None:
                yield code
            code, place = [], 0
        elif row[0] == "Address":
            head = row
        elif code is not None:
            cells = dict(zip(head, row, strict=True))
            stalls = {
                name.removeprefix(STALL): int(float(cell or 0))
                for name, cell in cells.items()
                if name.startswith(STALL) and "(Not" not in name
            }
            executed = int(float(cells["Instructions Executed"] or 0))
            if executed > 0:
                samples = int(float(cells["# Samples"] or 0))
                code.append(Instruction(place, executed, samples, {k: n for k, n in stalls.items() if n}))
            place += 1
    if code is not None:
        yield code


def parts(code: list[Instruction]) -> list[list[Instruction]]:
    """Neighbours that are executed equally often."""
    found: list[list[Instruction]] = []
    for one in code:
        last = found[-1] if found else None
        if (
            last is not None
            and abs(last[0].executed - one.executed) <= AS_OFTEN * one.executed
            and one.place - last[-1].place <= GAP
        ):
            last.append(one)
        else:
            found.append([one])
    return found


def reasons(code: list[Instruction], count: int) -> str:
    total: Counter[str] = Counter()
    for one in code:
        total.update(one.stalls)
    return ", ".join(f"{name} {samples}" for name, samples in total.most_common(count))


def described(kernel: Kernel, code: list[Instruction], least: float) -> Iterator[str]:
    yield f"{kernel.name} {kernel.blocks} blocks of {kernel.threads} threads"
    numbers = kernel.numbers
    yield "  " + ", ".join(f"{numbers[name]:g} {what}" for name, what in NUMBERS.items() if name in numbers)
    if {"SM Active Cycles", "Elapsed Cycles"} <= numbers.keys():
        active, elapsed = numbers["SM Active Cycles"], numbers["Elapsed Cycles"]
        yield f"  a multiprocessor had a warp for {active:.0f} of {elapsed:.0f} cycles, {active / elapsed:.0%}"
    samples = sum(one.samples for one in code)
    yield f"  {samples} samples: {reasons(code, 2 * REASONS)}"
    for part in parts(code):
        own = sum(one.samples for one in part)
        if own >= least / 100 * samples and own > 0:
            times = part[0].executed / kernel.warps
            yield (
                f"  {part[0].place:6} to {part[-1].place:6}: {len(part):4} instructions, {times:6.2f} times, "
                f"{own / samples:6.1%}  {reasons(part, REASONS)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("details", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--least", type=float, default=0.5)
    arguments = parser.parse_args()
    for page in (arguments.details, arguments.source):
        if not page.is_file():
            parser.error(f"{page} is no file; it must be a page of a report")
    seen = kernels(arguments.details.read_text().splitlines())
    with arguments.source.open(newline="") as file:
        codes = list(sources(csv.reader(file)))
    if len(seen) != len(codes):
        parser.error(
            f"{arguments.details} has {len(seen)} kernels and {arguments.source} {len(codes)}; "
            "both must be of one report"
        )
    for kernel, code in zip(seen, codes, strict=True):
        print("\n".join(described(kernel, code, arguments.least)), end="\n\n")


if __name__ == "__main__":
    main()
