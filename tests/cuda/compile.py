"""Compiles the CUDA kernels for a GPU that need not be there, and says what that took and what they take.

    python tests/cuda/compile.py <folder of CUDA's bin> <build folder> <architectures>

Ends in an error where a kernel is one too many or the time is beyond the bar.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from programs import ROOT, tool

# Of kernels, and of minutes of CPU time for one architecture: what is wanted, and what ends in an error.
WANTED_KERNELS, MOST_KERNELS = 120, 220
WANTED_MINUTES, MOST_MINUTES = 12.0, 24.0


class Kernel(NamedTuple):
    """Registers of a thread; bytes of its stack, where spilled registers are, and of static shared memory."""

    name: str
    registers: int
    stack: int
    shared: int


def kernels(cuobjdump: Path, library: Path) -> list[Kernel]:
    """Those in `library`, in all architectures together."""
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    names = subprocess.run(
        ["c++filt", "-p"],
        input="\n".join(name for name, *_ in found),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return [
        Kernel(
            re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|bitfold::(cuda::)?", "", name),
            *map(int, numbers),
        )
        for name, (_, *numbers) in zip(names, found, strict=True)
    ]


def compile_kernels(nvcc: Path, folder: Path, architectures: str) -> tuple[Path, float, float]:
    """The library, and the seconds that it took: on the clock, and of all processors."""
    options = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CUDA_COMPILER": nvcc,
        "BITFOLD_PYTHON": "OFF",
        "BITFOLD_WERROR": "ON",
        "BITFOLD_CUDA": "on",
        "BITFOLD_CUDA_ARCHS": architectures,
    }
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cmake = tool("cmake")
    for command in (
        [
            cmake,
            "-G",
            "Ninja",
            "-S",
            ROOT,
            "-B",
            folder,
            *(f"-D{name}={value}" for name, value in options.items()),
        ],
        [cmake, "--build", folder, "--target", "bitfold_cuda"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(result.stdout[-8000:] + result.stderr[-8000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder / "libbitfold_cuda.a", time.monotonic() - start, cpu


def main(toolkit: Path, folder: Path, architectures: str) -> None:
    library, seconds, cpu = compile_kernels(toolkit / "nvcc", folder, architectures)
    found = sorted(kernels(toolkit / "cuobjdump", library))
    for kernel in found:
        print(f"{kernel.registers:4} registers {kernel.stack:6} bytes of stack  {kernel.name}")
    count = len(found) // len(architectures.split(";"))
    print(
        f"{count} kernels for {architectures}; compiled in {seconds / 60:.1f} minutes, {cpu / 60:.1f} of CPU time "
        f"(ccache may have known some); wanted are about {WANTED_KERNELS} and at most {WANTED_MINUTES:g} minutes"
    )
    if count > MOST_KERNELS:
        raise SystemExit(f"{count} kernels, and at most {MOST_KERNELS} are allowed")
    if cpu > 60 * MOST_MINUTES * len(architectures.split(";")):
        raise SystemExit(
            f"{cpu / 60:.1f} minutes of CPU time, and at most {MOST_MINUTES:g} for an architecture are allowed"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[3])  # CMake wants whole paths
