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
    """run(number, *names): the program with that mutation, on the cases of these names."""
    source = programs.ROOT / "build" / "mutants"
    mutations.write(MUTATIONS, source)
    program = programs.build("kernel_tests", "mutants", kernel_cases.QUICK_UNITS, source)

    def run(number: int, *names: str) -> subprocess.CompletedProcess:
        cases = [case for name in names for case in kernel_cases.quick(kernel_cases.KERNELS[name])]
        environment = {"BITFOLD_MUTANT": str(number), "ASAN_OPTIONS": "detect_leaks=0"}
        files = [kernel_cases.write(case) for case in cases]
        files.sort(key=lambda file: file.stat().st_size)  # the first that fails ends the program
        return programs.run(program, SCHEDULES, *map(str, files), **environment)

    return run


def test_every_row_of_the_table_is_in_the_sources_once():
    assert mutations.stale() == []


@pytest.mark.parametrize("name", kernel_cases.KERNELS)
def test_without_a_mistake_all_cases_pass(name: str, run):
    result = run(0, name)
    assert result.returncode == 0, result.stdout + result.stderr


def numbered():
    for number, mutation in enumerate(MUTATIONS, 1):
        marks = [pytest.mark.xfail(reason=mutation.unseen, strict=True)] if mutation.unseen else []
        yield pytest.param(number, id=str(mutation), marks=marks)


@pytest.mark.parametrize("number", list(numbered()))
def test_a_mistake_is_found(number: int, run):
    mutation = MUTATIONS[number - 1]
    try:
        result = run(number, *mutation.cases)
    except subprocess.TimeoutExpired:  # found: it hangs
        return
    assert result.returncode != 0, f"no case of {' and '.join(mutation.cases)} fails with {mutation}"
