"""CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, by way of the emulator.

Races don't depend on the schedule here: ThreadSanitizer looks at what orders two accesses, not at what happened first.
"""

from __future__ import annotations

import re
from pathlib import Path

import kernel_cases
import mutations
import programs
import pytest
from case_file import Case

SOURCE = (Path(__file__).parent / "sanitizer_tests.cpp").read_text()
KERNELS = re.findall(r"\b(?:SECOND_)?KERNEL\((\w+), \d", SOURCE)


def named(*prefixes: str) -> list[str]:
    found = [name for name in KERNELS if name.startswith(prefixes)]
    assert found
    return found


# ---- do they see? ----


@pytest.mark.parametrize("kernel", named("race"))
def test_a_race_is_reported(kernel: str):
    result = programs.run(programs.build("sanitizer_tests", "thread"), kernel)
    assert result.returncode == 66, result.stdout + result.stderr
    assert "data race" in result.stderr
    # A copy has no stack: the report names whom it races with, of two kernels the first.
    assert re.search(rf"{kernel}|swap_numbers", result.stderr)


@pytest.mark.parametrize("kernel", named("overrun"))
def test_an_access_outside_of_an_allocation_is_reported(kernel: str):
    result = programs.run(programs.build("sanitizer_tests", "address"), kernel)
    if result.returncode == 3:  # the emulator asks about what one instruction moves
        assert "bytes that aren't all allocated at sanitizer_tests.cpp" in result.stdout
    else:
        assert result.returncode == 1
        assert re.search(r"(heap|stack)-buffer-overflow", result.stderr), result.stderr
        assert kernel in result.stderr


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("kernel", named("quiet"))
def test_nothing_is_reported_without_a_mistake(kernel: str, variant: str):
    result = programs.run(programs.build("sanitizer_tests", variant), kernel)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran\n", "")


# ---- the kernels ----


def check(program: Path, schedules: int, cases: list[Case]) -> None:
    files = [str(kernel_cases.write(case)) for case in cases]
    result = programs.run(program, str(schedules), *files, BITFOLD_MUTANT="0")
    assert result.returncode == 0, (result.stdout + result.stderr)[:8000]
    assert result.stderr == ""


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_kernels_stay_inside_of_their_memory(kernel: str):
    """In the program of test_mutations.py, none of whose mistakes is chosen: one build for both."""
    check(mutations.build(), mutations.SCHEDULES, kernel_cases.quick(kernel_cases.KERNELS[kernel]))


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_kernels_have_no_races(kernel: str):
    cases = kernel_cases.last_of_each_format(kernel_cases.quick(kernel_cases.KERNELS[kernel]))
    check(programs.build("kernel_tests", "thread", kernel_cases.QUICK_UNITS), 1, cases)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_kernels_of_every_format_stay_inside_of_their_memory(kernel: str):
    check(programs.build("kernel_tests", "address"), 2, kernel_cases.KERNELS[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_kernels_of_every_format_have_no_races(kernel: str):
    cases = kernel_cases.last_of_each_format(kernel_cases.KERNELS[kernel])
    check(programs.build("kernel_tests", "thread"), 1, cases)
