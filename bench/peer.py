"""A library that bitfold is timed beside, in a process of its own, whose environment may be another one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Peer:
    """A peer's side of a benchmark: `code`, run by `python` with `arguments`, answers every line on its standard input
    with "seconds", those on the wall and those of its threads, and ends with the input.
    """

    def __init__(self, name: str, python: str, code: str, *arguments: object) -> None:
        self.name = name
        command = [python, "-W", "ignore", "-c", code, *map(str, arguments)]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, request: str = "") -> tuple[float, float]:
        """Seconds on the wall and of threads."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{request}\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith("seconds"):
                wall, busy = map(float, line.split()[1:])
                return wall, busy
        raise SystemExit(f"{self.name} ended without an answer; run its part (PEER) by hand to see why")

    def close(self) -> None:
        """Waits for what it leaves in files."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        if self.child.wait() != 0:
            raise SystemExit(f"{self.name} failed")


def timed(function: Callable[[], Result]) -> tuple[float, float, Result]:
    """Seconds on the wall and of threads, and what came of it."""
    wall, busy = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - busy, result
