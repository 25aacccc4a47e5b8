"""Asks the oldest CUDA that README.md names whether it takes the kernels.

    python tests/cuda/oldest_cuda.py <folder of CUDA's bin, a package's> <build folder of compile.py> [<architecture>]

No package has the nvcc of CUDA 12. One has its compiler of device code as a library, NVRTC, which understands C++ as
nvcc does. It takes none of the host's headers: oldest_headers.hpp stands in for them, and what the host alone runs is
parsed and no more. Its front end reads all units, which takes seconds; for an architecture (compute_90a; with sm_90a by
the release's assembler, too) they are compiled, which takes minutes, and their kernels counted. Ends in an error where
a unit isn't taken, or there are other kernels than nvcc finds.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

from programs import ROOT

VERSION = (12, 4)
READ_FOR = "compute_90a"
STAND_INS = Path(__file__).with_name("oldest_headers.hpp")
STOOD_IN = (
    "algorithm",
    "array",
    "bit",
    "charconv",
    "cmath",
    "cstddef",
    "cstdint",
    "cstring",
    "cuda_runtime.h",
    "limits",
    "optional",
    "stdexcept",
    "stdint.h",
    "stdlib.h",
    "string",
    "string_view",
    "type_traits",
    "utility",
    "vector",
)


class Compiler:
    """NVRTC of the oldest CUDA."""

    def __init__(self, nvidia: Path, stand_ins: Path):
        of_cuda = (nvidia / name / "include" for name in ("cuda_cccl", "cuda_runtime"))
        self.includes = (stand_ins, ROOT / "csrc", *of_cuda)
        self.library = ctypes.CDLL(str(nvidia / "cuda_nvrtc" / "lib" / f"libnvrtc.so.{VERSION[0]}"))
        found = ctypes.c_int(), ctypes.c_int()
        self.call("Version", *(ctypes.byref(number) for number in found))
        if tuple(number.value for number in found) != VERSION:
            raise SystemExit(
                f"{nvidia} holds NVRTC of CUDA {found[0].value}.{found[1].value}, not of {VERSION}"
            )

    def call(self, name: str, *arguments: object) -> None:
        if status := getattr(self.library, f"nvrtc{name}")(*arguments):
            raise RuntimeError(f"nvrtc{name}: error {status}")

    def text(self, kind: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self.call(f"Get{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"Get{kind}", program, buffer)
        return buffer.raw.decode(errors="replace")

    def kernels(self, source: Path, defines: list[str], architecture: str | None) -> int:
        """How many kernels a unit has, none where it is only read; a RuntimeError with what the compiler said where it
        isn't taken."""
        options = ["--std=c++20", f"-arch={architecture or READ_FOR}", "-default-device", *defines]
        options += [] if architecture else ["--fdevice-syntax-only"]
        options += [f"--include-path={folder}" for folder in self.includes]
        program = ctypes.c_void_p()
        text = f"#include <cuda_runtime.h>\n{source.read_text()}".encode()
        self.call("CreateProgram", ctypes.byref(program), text, str(source).encode(), 0, None, None)
        values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self.call("CompileProgram", program, len(options), values)
        except RuntimeError:
            raise RuntimeError(self.text("ProgramLog", program)) from None
        return len(re.findall(r"\.entry", self.text("PTX", program))) if architecture else 0


def write_stand_ins(folder: Path) -> None:
    """What takes the place of headers, by the names that #include gives them."""
    for name in STOOD_IN:
        (folder / name).write_text(STAND_INS.read_text())
    # Devices have no static variables that begin with more than a constant.
    launch = Path("cuda") / "gpu" / "launch.hpp"
    (folder / launch).parent.mkdir(parents=True)
    (folder / launch).write_text((ROOT / "csrc" / launch).read_text().replace("static const ", "const "))


def units(folder: Path) -> list[tuple[Path, list[str]]]:
    """The sources that nvcc compiled in a build folder, with what it was told that concerns their meaning."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    found = []
    for command in commands:
        words = shlex.split(command["command"])
        if command["file"].endswith(".cu"):
            found.append((Path(command["file"]), [w for w in words if w.startswith(("-D", "-fmad"))]))
    return found


def take(
    nvidia: Path, stand_ins: Path, architecture: str | None, source: Path, defines: list[str]
) -> tuple[int, str]:
    """The unit's kernels, and what is wrong with it."""
    try:
        return Compiler(nvidia, stand_ins).kernels(source, defines, architecture), ""
    except RuntimeError as error:
        return 0, f"{source.stem}: {error}"


def count_of_nvcc(toolkit: Path, folder: Path) -> int:
    """The kernels in what nvcc compiled."""
    command = [toolkit / "cuobjdump", "--dump-elf-symbols", folder / "libbitfold_cuda.a"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("STO_ENTRY")


def main(toolkit: Path, folder: Path, architecture: str | None = None) -> None:
    nvidia = toolkit.resolve().parents[1]  # its packages lie side by side
    work = units(folder)
    if not work:
        raise SystemExit(f"{folder} has no unit that nvcc compiled: compile.py comes first")
    with TemporaryDirectory() as name, ProcessPoolExecutor(os.cpu_count()) as pool:
        write_stand_ins(Path(name))
        same = (repeat(nvidia), repeat(Path(name)), repeat(architecture))
        results = list(pool.map(take, *same, *zip(*work, strict=True)))
    wrong = [said for _, said in results if said]
    kernels = sum(count for count, _ in results)
    if architecture and not wrong and kernels != (expected := count_of_nvcc(toolkit, folder)):
        wrong.append(f"{kernels} kernels, where nvcc has {expected}")
    if wrong:
        raise SystemExit("\n".join(wrong))
    took = f"compiles {kernels} kernels for {architecture} of" if architecture else "reads"
    print(f"CUDA {VERSION[0]}.{VERSION[1]} {took} {len(results)} units")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
