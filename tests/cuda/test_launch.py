"""How kernels are started on a GPU (csrc/cuda/gpu/launch.hpp), without one: CUDA's headers, and a stand-in for its run
time (launch_tests.cpp)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from toolchain import nvcc, tool

ROOT = Path(__file__).parents[2]


def test_what_threads_of_the_host_may_do_at_once(tmp_path):
    compiler = nvcc()
    if compiler is None:
        pytest.skip("`make cuda` was not run")
    program = tmp_path / "launch_tests"
    command = [
        tool("c++"),
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-isystem",
        compiler.parents[1] / "include",
    ]
    command += ["-I", ROOT / "csrc", ROOT / "tests" / "cuda" / "launch_tests.cpp", "-o", program]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
