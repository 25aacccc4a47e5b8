"""third_party/cuda.cmake: for which GPUs a build has kernels, and why it has none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from toolchain import nvcc, tool

ROOT = Path(__file__).parents[2]
PROJECT = f"""cmake_minimum_required(VERSION 3.20)
project(configured LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
include({ROOT}/third_party/cuda.cmake)
message("kernels: ${{BITFOLD_HAVE_CUDA}}")
if(BITFOLD_HAVE_CUDA)
  message("for: ${{CMAKE_CUDA_ARCHITECTURES}}")
endif()
"""


NVCC = nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="`make cuda` was not run")


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """What CMake says of a machine that sees GPUs of these compute capabilities: its exit status, and the text."""

    def program(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)

    def run(*defines: str, gpus: tuple[str, ...] = (), nvcc: str = "exit 1") -> tuple[int, str]:
        program("nvidia-smi", "".join(f"echo {gpu}\n" for gpu in gpus) or "exit 9\n")
        program("nvcc", nvcc + "\n")
        (tmp_path / "CMakeLists.txt").write_text(PROJECT)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDACXX", raising=False)
        command = [tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja"]
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *(f"-DBITFOLD_{define}" for define in defines)]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.returncode, " ".join((result.stdout + result.stderr).split())

    return run


def test_a_machine_without_a_gpu_builds_for_the_cpu(configure):
    status, said = configure()
    assert status == 0
    assert (
        "CUDA: no GPU is visible (BITFOLD_CUDA=on builds for 80-real;86-real;89-real;90a-real;90-virtual)"
        in said
    )
    assert "kernels: FALSE" in said


def test_a_gpu_that_is_too_old_is_named(configure):
    status, said = configure(gpus=("7.5", "6.1"))
    assert status == 0
    assert "no kernels for the GPU of compute capability 7.5; they begin with 8.0" in said
    assert "no visible GPU has compute capability 8.0 or more" in said
    assert "kernels: FALSE" in said


@pytest.mark.parametrize(
    ("gpus", "why"),
    [(("7.5",), "no visible GPU has compute capability 8.0"), ((), "no nvcc was found that works")],
)
def test_kernels_that_are_asked_for_are_an_error_where_there_are_none(configure, gpus, why):
    status, said = configure("CUDA=on", gpus=gpus)
    assert status != 0
    assert f"BITFOLD_CUDA=on, but {why}" in said


@pytest.mark.parametrize("arch", ["75-real", "70", "native", "8.6", "90a-fast"])
def test_names_of_gpus_are_checked(configure, arch):
    status, said = configure("CUDA=on", f"CUDA_ARCHS=80-real;{arch}")
    assert status != 0
    assert f"BITFOLD_CUDA_ARCHS has '{arch}': it must be 80 or more, as in 80-real" in said


@needs_nvcc
@pytest.mark.parametrize(
    ("gpus", "archs"),
    [(("9.0",), "90a-real"), (("12.0", "6.1", "8.6", "12.0"), "120-real;86-real")],
)
def test_the_visible_gpus_decide(configure, gpus, archs):
    status, said = configure(gpus=gpus, nvcc=f'exec {NVCC} "$@"')
    assert status == 0
    assert said.endswith(f"for: {archs}")


@needs_nvcc
def test_a_gpu_that_nvcc_does_not_know_gets_ptx(configure):
    older = f'case "$*" in --list-gpu-code) echo sm_80; echo sm_90;; *) exec {NVCC} "$@";; esac'
    status, said = configure(gpus=("12.0", "12.1", "8.0"), nvcc=older)
    assert status == 0
    assert "doesn't know sm_120, building PTX of 9.0 for it" in said
    assert said.endswith("for: 90-virtual;80-real")


@needs_nvcc
@pytest.mark.parametrize(("mode", "fails"), [("auto", False), ("on", True)])
def test_an_nvcc_that_is_too_old(configure, mode, fails):
    older = f'case "$*" in --version) echo "release 12.3, V12.3.107";; *) exec {NVCC} "$@";; esac'
    status, said = configure(f"CUDA={mode}", gpus=("8.0",), nvcc=older)
    assert (status != 0) == fails
    assert "is CUDA 12.3, and bitfold needs 12.4 or newer" in said
