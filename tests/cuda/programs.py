"""The C++ programs beside this file, built once for a session in build/cuda-<variant>."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import toolchain

ROOT = Path(__file__).parents[2]

ADDRESS = (
    "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all "
    "-fsanitize=address,bounds,float-cast-overflow,shift,signed-integer-overflow"
)
# What all code but the emulator's own run time is compiled with.
VARIANTS = {
    "plain": "-O1",
    "ucontext": "-O1 -DBITFOLD_EMULATOR_UCONTEXT",  # what processors without a hand-written switch use
    "address": ADDRESS,
    "thread": "-O1 -g1 -fsanitize=thread",
    "mutants": f"{ADDRESS} -include mutant.hpp",  # mutations.py
}


@functools.cache
def build(program: str, variant: str = "plain", units: str = ".*", source: Path = ROOT) -> Path:
    """The path of a program of tests/cuda/CMakeLists.txt; units: a regular expression of csrc/cuda/units.cmake's;
    source: the project, or a copy of it."""
    folder = ROOT / "build" / f"cuda-{variant}"
    cmake = toolchain.tool("cmake")
    options = {
        "CMAKE_MAKE_PROGRAM": toolchain.tool("ninja"),
        "CMAKE_BUILD_TYPE": "Debug",  # adds nothing to the flags but -g
        "CMAKE_CXX_FLAGS_DEBUG": VARIANTS[variant],
        "BITFOLD_PYTHON": "OFF",
        "BITFOLD_CUDA": "off",
        "BITFOLD_CUDA_TESTS": "ON",
        "BITFOLD_EMULATED_UNITS": units,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    configure = [cmake, "-G", "Ninja", "-S", source, "-B", folder, *defines]
    toolchain.build(folder, configure, [cmake, "--build", folder, "--target", program])
    return folder / "tests" / "cuda" / program


def run(
    program: Path, *arguments: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a program; under ThreadSanitizer at fixed addresses, without which some kernels give it no room."""
    command = [str(program), *arguments]
    if program.is_relative_to(ROOT / "build" / "cuda-thread") and shutil.which("setarch"):
        command = ["setarch", platform.machine(), "-R", *command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
    )
