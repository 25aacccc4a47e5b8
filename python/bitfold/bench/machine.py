"""What a result must name to be read later: the CPU, its caches, the commit, the versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import bitfold
from bitfold import _C
from bitfold.versions import installed

LIBRARIES = ("torch", "numpy", "bitsandbytes", "kernels", "torchao", "transformers")
_SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def machine() -> dict[str, Any]:
    """CPU model, logical CPUs this process may run on, caches in bytes, instruction sets, RAM in bytes.

    load: how many programs wanted a CPU over the last minute; of a run's start it tells how quiet that was.
    """
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches(),
        "isa": _C.isa(),
        "isas": [name for name, available in _C.cpu_features().items() if available is True],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "ram": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    """Version of bitfold, its commit, and of every library that a figure may depend on; None where absent."""
    found: dict[str, str | None] = {
        "bitfold": bitfold.__version__,
        "commit": commit(),
        "compiler": _C.build_info()["compiler"],
    }
    return found | {name: installed(name) for name in LIBRARIES}


def caches() -> dict[str, int]:
    """Bytes of each data cache as one core sees it, by name ("L1", "L2", "L3"); empty where Linux tells nothing."""
    found = {}
    for index in sorted(_SYSFS_CACHES.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            found["L" + (index / "level").read_text().strip()] = _bytes((index / "size").read_text().strip())
    return found


def last_level_cache() -> int:
    """Bytes of the largest data cache; 0 where it isn't known."""
    return max(caches().values(), default=0)


def commit() -> str | None:
    """What git calls the working tree that this package lies in; None for an installed package."""
    package = Path(bitfold.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A wheel may lie in an environment inside another project's working tree.
        if not (Path(git("rev-parse", "--show-toplevel")) / "python" / "bitfold").samefile(package):
            return None
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _bytes(text: str) -> int:
    return int(text[:-1]) * _SUFFIXES[text[-1]] if text[-1] in _SUFFIXES else int(text)
