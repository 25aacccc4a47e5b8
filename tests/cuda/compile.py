"""Compiles the CUDA kernels for a GPU that need not be there, and the module with them; says what both took.

    PYTHONPATH=tests python tests/cuda/compile.py <folder of CUDA's bin> <build folder> <architectures>

Ends in an error where there is a kernel or a minute too many, a kernel lacks the instructions that it is made for, or
ptxas had to wait where the kernel doesn't.
The module, beside bitfold's Python, is left in <build folder>/site, for test_module.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_counts
import kernel_faults
import machine_code
from programs import ROOT
from toolchain import tool

# Of kernels (some 120 for formats and quantizers, and those of the KV cache), and of minutes of CPU time for one
# architecture.
MOST_KERNELS = 128
MOST_MINUTES = 12.0

# What Python runs first: an editable bitfold would come before all of PYTHONPATH.
WITHOUT_EDITABLE = """import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


def run(*command: object) -> str:
    """What the command printed."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stdout[-8000:] + result.stderr[-8000:])
    return result.stdout + result.stderr


def configure(nvcc: Path, folder: Path, architectures: str) -> None:
    options = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CUDA_COMPILER": nvcc,
        # As pip's build names it: ccache takes another name for another compiler.
        "CMAKE_CXX_COMPILER": os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0],
        "Python_EXECUTABLE": sys.executable,
        "BITFOLD_WERROR": "ON",
        "BITFOLD_CUDA": "on",
        "BITFOLD_CUDA_ARCHS": architectures,
    }
    defines = (f"-D{name}={value}" for name, value in options.items())
    run(tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *defines)


def compile_kernels(folder: Path) -> tuple[Path, float, float, str]:
    """The library, the seconds that it took, on the clock and of all processors, and what the compilers said."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    said = run(tool("cmake"), "--build", folder, "--target", "bitfold_cuda")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder / "libbitfold_cuda.a", time.monotonic() - start, cpu, said


def link_module(folder: Path) -> None:
    run(tool("cmake"), "--build", folder, "--target", "_C")
    package = folder / "site" / "bitfold"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "python" / "bitfold", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__")
    )
    (module,) = folder.glob("_C.*.so")
    shutil.copy(module, package)
    (package.parent / "sitecustomize.py").write_text(WITHOUT_EDITABLE)


def main(toolkit: Path, folder: Path, architectures: str) -> None:
    configure(toolkit / "nvcc", folder, architectures)
    library, seconds, cpu, said = compile_kernels(folder)
    with ThreadPoolExecutor(1) as pool:
        module = pool.submit(link_module, folder)  # while the disassembler works
        kernels = machine_code.read(toolkit, library)
        module.result()
    for kernel in kernels:
        print(
            f"{kernel.registers:4} registers {kernel.stack:6} bytes of stack {kernel.bytes_of('STL'):5} stored "
            f"{kernel.bytes_of('LDL'):5} loaded  {kernel.name}"
        )
    kernel_counts.print_loops(kernels)
    minutes = cpu / 60 / len(architectures.split(";"))
    print(
        f"{len(kernels)} kernels for each of {architectures}; compiled in {seconds / 60:.1f} minutes, {minutes:.1f} "
        f"of CPU time for one (ccache may have known some)"
    )
    wrong = kernel_faults.faults(kernels) + kernel_faults.complaints(said)
    if len(kernels) > MOST_KERNELS:
        wrong.append(f"{len(kernels)} kernels, and at most {MOST_KERNELS} are allowed")
    if minutes > MOST_MINUTES:
        wrong.append(f"{minutes:.1f} minutes of CPU time, and at most {MOST_MINUTES:g} are allowed")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[3])  # CMake wants whole paths
