"""A library that bitfold is timed beside, in a process of its own, whose environment may be another one; and what is
told of the times of both."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bitfold.bench.machine import machine, versions

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


def command_line(about: str, library: str, runs: int, of: str = "") -> argparse.ArgumentParser:
    """What a benchmark of one matrix beside a peer is told.

    about: the script's docstring; library: the peer's; runs: by default; of: what, where that must be said.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--runs", type=int, default=runs, help=of or None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", help=f"a Python that has {library}")
    parser.add_argument("--out", type=Path, help="a JSON file; the table goes beside it as .txt")
    return parser


def timed(function: Callable[[], Result]) -> tuple[float, float, Result]:
    """Seconds on the wall and of threads, and what came of it."""
    wall, busy = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - busy, result


def summary(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Of each who took turns (name: pairs as of `timed`), the first of them bitfold: all seconds and their medians.
    With a peer, bitfold's medians over its: "time_ratio" and "busy_ratio"."""
    report: dict[str, Any] = {}
    for name, pairs in times.items():
        walls, busy = zip(*pairs, strict=True)
        report[name] = {
            "seconds": list(walls),
            "busy_seconds": list(busy),
            "median": statistics.median(walls),
            "busy_median": statistics.median(busy),
        }
    if len(report) == 2:
        ours, theirs = report.values()
        report["time_ratio"] = ours["median"] / theirs["median"]
        report["busy_ratio"] = ours["busy_median"] / theirs["busy_median"]
    return report


def time_lines(report: dict[str, Any], bar: float, what: str = "") -> list[str]:
    """What `summary` found, a line each; bar: what the ratio of times must not exceed."""
    names = [name for name, found in report.items() if isinstance(found, dict)]
    lines = [
        f"{what}{name:16}{report[name]['median']:8.2f} s on the wall, "
        f"{report[name]['busy_median']:8.2f} s of its threads"
        for name in names
    ]
    if "time_ratio" in report:
        ratio = report["time_ratio"]
        lines.append(
            f"{what}time over {names[1]}'s: {ratio:.3f} (threads' {report['busy_ratio']:.3f}), "
            f"wanted {bar}, met: {ratio <= bar}"
        )
    return lines


def save(out: Path | None, name: str, report: Any, text: str, threads: int) -> None:
    """Prints the text; puts the report as `name` into the JSON file `out`, and the text beside it as .txt."""
    print(text)
    if out is not None:
        whole = {"machine": machine(), "versions": versions(), "threads": threads, name: report}
        out.write_text(json.dumps(whole, indent=1) + "\n")
        out.with_suffix(".txt").write_text(text + "\n")
