"""Would the kernels' cases find a mistake? Each mutation of mutations.py, in a copy of the kernels, has to fail.

That they pass without one, in the same program, is test_sanitizers.py's.
"""

from __future__ import annotations

import subprocess

import kernel_cases
import mutations
import programs
import pytest

MUTATIONS = mutations.find()


@pytest.fixture(scope="module")
def run():
    """run(number, *names): the program with that mutation, on the cases of these names."""
    program = mutations.build()

    def run(number: int, *names: str) -> subprocess.CompletedProcess:
        cases = [case for name in names for case in kernel_cases.quick(kernel_cases.KERNELS[name])]
        environment = {"BITFOLD_MUTANT": str(number), "ASAN_OPTIONS": "detect_leaks=0"}
        files = [kernel_cases.write(case) for case in cases]
        files.sort(key=lambda file: file.stat().st_size)  # the first that fails ends the program
        return programs.run(program, str(mutations.SCHEDULES), *map(str, files), **environment)

    return run


def test_every_row_of_the_table_is_in_the_sources_once():
    assert mutations.stale() == []


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
