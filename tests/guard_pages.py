"""Runs Python where memory ends at a page that nobody may touch (guard_pages.cpp): what reads or writes past the end
of a tensor or of a kernel's scratch memory dies there, with a traceback, instead of where memory happens to end.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from toolchain import tool

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> Path:
    """The allocator, built once a session; two sessions at once don't disturb each other."""
    target = SOURCE.parents[1] / "build" / "guard_pages.so"
    target.parent.mkdir(exist_ok=True)
    own = target.with_name(f"{target.name}.{os.getpid()}")
    compiler = os.environ.get("CXX", sysconfig.get_config_var("CXX").split()[0])
    options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", own]
    result = subprocess.run([tool(compiler), *options, SOURCE, "-ldl"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    own.replace(target)
    return target


def guarded() -> dict[str, str]:
    """What the environment of a process has to say for its memory to be guarded: nothing where that can't be."""
    return {"LD_PRELOAD": str(library())} if sys.platform == "linux" else {}
