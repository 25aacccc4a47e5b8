"""What loops of the CUDA kernels wait for soon after they have asked for it.

    python tests/cuda/load_waits.py <folder of CUDA's bin> <library or cubin> [<instructions>]

prints, of each inner loop with products, the loads from global memory and from a stack that an instruction of the loop
waits for within so many instructions (20) on the shortest way from the load to it: a warp can do no more than these
before memory has answered. A way may be one that no data takes.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from pathlib import Path

from machine_code import Instruction, Kernel, read

WITHIN = 20
LONGEST = 1000  # instructions of a loop: a jump back from code behind all loops makes one of thousands


def followers(loop: list[Instruction]) -> list[list[int]]:
    """Where in the loop a warp may be next. Not where lanes part (BRA.DIV), for which there is code elsewhere."""
    places = {i.address: n for n, i in enumerate(loop)}
    found: list[list[int]] = []
    for n, i in enumerate(loop):
        target = re.search(r"0x([0-9a-f]+)$", i.operands) if i.name == "BRA" else None
        part = i.code.startswith("BRA.DIV")
        always = i.name == "EXIT" or (
            target is not None and not part and not i.guard and "P" not in i.operands
        )
        after = [] if always or n + 1 == len(loop) else [n + 1]
        if target and not part and int(target[1], 16) in places:
            after.append(places[int(target[1], 16)])
        found.append(after)
    return found


def distance(loop: list[Instruction], load: int) -> tuple[int, Instruction] | None:
    """Instructions from a load to the first that waits for it on the shortest way, and that one."""
    counter = loop[load].counter
    if counter is None:
        return None
    after = followers(loop)
    queue, seen = deque((n, 1) for n in after[load]), set()
    while queue:
        n, steps = queue.popleft()
        if n in seen:
            continue
        seen.add(n)
        if loop[n].waits_for(counter):
            return steps, loop[n]
        queue.extend((m, steps + 1) for m in after[n])
    return None


def soon_awaited(loop: list[Instruction], within: int = WITHIN) -> list[tuple[Instruction, int, Instruction]]:
    found = []
    for n, i in enumerate(loop):
        if i.name in ("LDG", "LDL") and (answer := distance(loop, n)) and answer[0] <= within:
            found.append((i, *answer))
    return found


def lines(kernel: Kernel, within: int) -> list[str]:
    out = []
    for product in ("HMMA", "HGMMA", "IMMA", "IGMMA"):
        for loop in kernel.inner_loops(product):
            if len(loop) > LONGEST:
                continue
            waits = soon_awaited(loop, within)
            number = sum(i.name == product for i in loop)
            out.append(f"  {len(loop)} instructions, {number} {product}: {len(waits)}")
            out += [
                f"    {load.code} {load.operands}, {steps} before {wait.code} {wait.operands}"
                for load, steps, wait in waits
            ]
    return [kernel.name, *out] if out else []


def main() -> None:
    bin, library, *rest = sys.argv[1:]
    within = int(rest[0]) if rest else WITHIN
    print(f"loads that are waited for within {within} instructions, of loops with products")
    for kernel in read(Path(bin), Path(library)):
        print("\n".join(lines(kernel, within)) or kernel.name)


if __name__ == "__main__":
    main()
