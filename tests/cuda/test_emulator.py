"""The emulator that runs CUDA kernels on the CPU, held against the rules of CUDA: the CASEs of emulator_*.cpp."""

from __future__ import annotations

import re
from pathlib import Path

import programs
import pytest

SOURCES = sorted(Path(__file__).parent.glob("emulator_*.cpp"))
CASES = [name for path in SOURCES for name in re.findall(r"^CASE\((\w+)\)", path.read_text(), re.MULTILINE)]
assert len(CASES) > 40


@pytest.mark.parametrize("case", CASES)
def test_case(case: str):
    result = programs.run(programs.build("emulator_tests"), case)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("0 of 1 cases failed\n")


@pytest.mark.slow
def test_every_case_on_the_system_s_own_switch_of_contexts():
    result = programs.run(programs.build("emulator_tests", "ucontext"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"0 of {len(CASES)} cases failed\n")


def test_a_failed_case_fails_the_program():
    result = programs.run(programs.build("emulator_tests"), "no_such_case")
    assert result.returncode == 1
