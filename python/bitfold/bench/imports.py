"""How long `import bitfold` takes beside torch's own import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from bitfold.bench.clock import Spread

_SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import bitfold
print(middle - start, time.perf_counter() - middle)
"""


def import_rows(processes: int = 5) -> list[dict[str, Any]]:
    """Rows of torch's import and of bitfold's after it: milliseconds over so many fresh interpreters.

    The first one, which fills the page cache, isn't counted.
    """
    runs = [_one_import() for _ in range(processes + 1)][1:]
    parts = {"torch": "torch", "bitfold": "bitfold"}
    return [
        {"op": "import", "name": name, "kind": kind, "ms": Spread.of([run[i] for run in runs]).as_ms()}
        for i, (name, kind) in enumerate(parts.items())
    ]


def _one_import() -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    torch_seconds, bitfold_seconds = map(float, done.stdout.split())
    return torch_seconds, bitfold_seconds
