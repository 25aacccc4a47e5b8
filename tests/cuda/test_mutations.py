"""Would the kernels' cases find a mistake? Each mutation of mutations.py, in a copy of the kernels, has to fail."""

from __future__ import annotations

import subprocess

import kernel_cases
import mutations
import programs
import pytest

MUTATIONS = mutations.find()
SCHEDULES = "3"


@pytest.fixture(scope="module")
def run():
    """run(number, cases): the program with that mutation, on these cases."""
    source = programs.ROOT / "build" / "mutants"
    mutations.write(MUTATIONS, source)
    program = programs.build("kernel_tests", "mutants", kernel_cases.QUICK_UNITS, source)

    def run(number: int, cases: str) -> subprocess.CompletedProcess:
        files = [str(kernel_cases.write(case)) for case in kernel_cases.quick(kernel_cases.KERNELS[cases])]
        environment = {"BITFOLD_MUTANT": str(number), "ASAN_OPTIONS": "detect_leaks=0"}
        return programs.run(program, SCHEDULES, *files, timeout=60, **environment)

    return run


@pytest.mark.parametrize("cases", kernel_cases.KERNELS)
def test_without_a_mistake_all_cases_pass(cases: str, run):
    result = run(0, cases)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=lambda i: str(MUTATIONS[i - 1]))
def test_a_mistake_is_found(number: int, run):
    mutation = MUTATIONS[number - 1]
    try:
        result = run(number, mutation.cases)
    except subprocess.TimeoutExpired:  # found: it hangs
        return
    assert result.returncode != 0, f"no case of {mutation.cases} fails with {mutation}"
