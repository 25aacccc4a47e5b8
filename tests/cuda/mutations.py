"""Mistakes to put into copies of the CUDA kernels, to see whether their tests would find them.

All of them are in one copy of the sources, each behind a question that the environment's BITFOLD_MUTANT answers:
one build runs them all and, where none is chosen, the kernels as they are, for test_sanitizers.py. What is dropped or
weakened wherever it stands (barriers, waits) is found by a pattern; wrong indices and ends are a table, mistakes.py.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import programs
from kernel_cases import QUICK_UNITS
from mistakes import WRONG
from programs import ROOT

SOURCES = ROOT / "csrc" / "cuda"
SCHEDULES = 3  # that each case runs in


class Mutation(NamedTuple):
    file: str  # of csrc/cuda
    start: int  # of the text that is replaced
    end: int
    text: str  # with @ where the mutant's number belongs
    what: str
    cases: tuple[str, ...]  # of kernel_cases.KERNELS
    unseen: str  # why no case can find it; empty where one must

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


# Which cases run a file's code; the first that matches.
CASES = {
    r"linear_tile\.cu|tile_copies\.hpp|chunk.*\.hpp": ("linear_tile",),
    r"tile_sums\.hpp": ("linear_tile", "linear_few", "linear_wgmma"),
    r"arrange\.cu": ("linear_tile", "linear_few", "linear_wgmma"),
    r"(linear_)?few.*\.hpp": ("linear_few",),
    r"linear_wgmma\.hpp|wgmma.*\.hpp": ("linear_wgmma",),
    r"linear_rows\.cu|rows_.*|tokens\.hpp|plane_.*\.hpp|fragments.*\.hpp|codes_k\.hpp": ("linear_rows",),
    r"linear_floor\.cu": ("linear_floor", "linear_grad_x"),
    r"int8.*\.(cu|hpp)": ("linear_int8",),
    r"decode\.cu|(whole_)?runs\.hpp": ("decode",),
    r"encode.*": ("encode",),
    r"pack\.cu": ("pack",),
    r"gptq\.cu": ("gptq_columns",),
    r"step_search\.cu": ("search_steps",),
    r"kv_pack\.cu": ("kv_pack",),
    r"kv_unpack\.cu": ("kv_unpack",),
    r"kv_blocks\.hpp": ("kv_attention", "kv_unpack"),
    r"kv_(attention|chunk|exact|merge|packed|units)\..*": ("kv_attention",),
}

# What is dropped without notice, and why: the file, the text and which of those in the file.
UNSEEN = {
    (
        "encode_blocks.hpp",
        "ptx::sync_block();",
        4,
    ): "a block of threads comes back for more after 2^20 others alone",
    (
        "tokens.hpp",
        "ptx::sync_warp();",
        1,
    ): "the lanes meet in the shuffles before it, which on a GPU alone promise nothing of what they wrote",
    (
        "rows_copies.hpp",
        "ptx::sync_warp();",
        1,
    ): "the lanes meet before the first piece, and before that in shuffles, where sums of x are wanted",
    (
        "linear_few.hpp",
        "ptx::sync_warp();",
        1,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "int8_wgmma.hpp",
        "ptx::sync_warp();",
        1,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        2,
    ): "the warp's products come after all that its lanes look at, and are its lanes' together",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        3,
    ): "weights are 0 there, and only what is no number would show it (test_kv_ops.py)",
    (
        "kv_packed.hpp",
        "ptx::sync_warp();",
        4,
    ): "weights are 0 there, and only what is no number would show it (test_kv_ops.py)",
    (
        "kv_packed.hpp",
        "ptx::cp_async_wait<0>();",
        2,
    ): "weights are 0 there, and only what is no number would show it (test_kv_ops.py)",
    (
        "wgmma_copies.hpp",
        "ptx::barrier_wait(&head.w_empty[w.slot], w.parity ^ 1);",
        3,
    ): "x has no more stages than two chunks have units, and waits for them before",
}

DROPPED = [
    r"ptx::sync_block\(\);",
    r"ptx::wait_for_earlier\(\);",
    r"ptx::sync_warp\(\);",
    r"ptx::bar_(?:sync|arrive)\([^;]*\);",
    r"ptx::barrier_(?:arrive|expect|wait)\([^;]*\);",
    r"ptx::cp_async_arrive\([^;]*\);",
    r"ptx::fence_(?:async|barrier_init)\(\);",
    r"ptx::wgmma_(?:fence|commit)\(\);",
]
WAIT = r"ptx::(cp_async|wgmma)_wait<(.+)>\(\);"


def cases_of(file: str) -> tuple[str, ...]:
    return next((cases for pattern, cases in CASES.items() if re.fullmatch(pattern, file)), ())


def texts_of_sources() -> dict[str, str]:
    return {
        path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".hpp")
    }


def stale() -> list[tuple[str, str]]:
    """Rows of WRONG whose text is no longer there, or more than once."""
    texts = texts_of_sources()
    return [
        (file, right) for file, row in WRONG.items() for right in row if texts.get(file, "").count(right) != 1
    ]


def find() -> list[Mutation]:
    found = []
    texts = texts_of_sources()
    for file, text in texts.items():
        cases = cases_of(file)
        if not cases:
            continue
        for pattern in [*DROPPED, WAIT]:
            for nth, match in enumerate(re.finditer(pattern, text), 1):
                line = text.count("\n", 0, match.start()) + 1
                if pattern == WAIT:
                    weak = f"ptx::{match[1]}_wait<({match[2]}) + 1>();"
                    code, what = (
                        f"{{ if (mutant(@)) {{ {weak} }} else {{ {match[0]} }} }}",
                        f"line {line} becomes {weak}",
                    )
                else:
                    code, what = f"{{ if (!mutant(@)) {{ {match[0]} }} }}", f"line {line} without {match[0]}"
                unseen = UNSEEN.get((file, match[0], nth), "")
                found.append(Mutation(file, match.start(), match.end(), code, what, cases, unseen))
    for file, mistakes in WRONG.items():
        for right, wrong in mistakes.items():
            if texts.get(file, "").count(right) == 1:
                start = texts[file].index(right)
                code, what = f"(mutant(@) ? ({wrong}) : ({right}))", f"{right} becomes {wrong}"
                found.append(Mutation(file, start, start + len(right), code, what, cases_of(file), ""))
    return found


# Read at run time, and never true where the compiler evaluates.
HEADER = """#pragma once
#include <cstdlib>
#include <type_traits>
namespace bitfold {
inline const int chosen_mutant = std::getenv("BITFOLD_MUTANT") ? std::atoi(std::getenv("BITFOLD_MUTANT")) : 0;
constexpr bool mutant(int number) { return !std::is_constant_evaluated() && chosen_mutant == number; }
}  // namespace bitfold
"""


def write(mutations: list[Mutation], folder: Path) -> None:
    """The sources with all mutations, numbered from 1, in `folder`; files that are so already aren't touched."""
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc", "tests/cuda", "third_party"):
        source = ROOT / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            content = path.read_text()
            if path.parent == SOURCES:
                content = mutated(
                    content, [(i, m) for i, m in enumerate(mutations, 1) if m.file == path.name]
                )
            update(folder / path.relative_to(ROOT), content)
    update(folder / "csrc" / "mutant.hpp", HEADER)


@functools.cache
def build() -> Path:
    """kernel_tests with all mutations, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    source = ROOT / "build" / "mutants"
    write(find(), source)
    return programs.build("kernel_tests", "mutants", QUICK_UNITS, source)


def mutated(content: str, mutations: list[tuple[int, Mutation]]) -> str:
    """Where mutations lie within others, the inner ones come first and are lost: their places must be disjoint."""
    last = len(content)
    for number, mutation in sorted(mutations, key=lambda numbered: -numbered[1].start):
        assert mutation.end <= last, f"{mutation}: overlaps another"
        last = mutation.start
        content = (
            content[: mutation.start] + mutation.text.replace("@", str(number)) + content[mutation.end :]
        )
    return content


def update(path: Path, content: str) -> None:
    if not path.exists() or path.read_text() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
