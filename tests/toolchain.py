"""The programs that tests build with."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock


def tool(name: str) -> str:
    """A program of this Python environment, or of the PATH; without it the test is skipped."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def nvcc() -> Path | None:
    """The one that `make cuda` compiled with."""
    cache = Path(__file__).parents[1] / "build-cuda" / "CMakeCache.txt"
    found = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache.read_text(), re.M) if cache.exists() else None
    return Path(found[1]) if found and Path(found[1]).exists() else None


def build(folder: Path, *commands: list[object]) -> None:
    """Commands that fill a folder of build/. Of processes side by side the first builds it, and the others wait."""
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        for command in commands:
            result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
