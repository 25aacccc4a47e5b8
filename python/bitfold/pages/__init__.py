"""What the pages share: their style, and files that lie beside the code."""

from __future__ import annotations

import re
from importlib.resources import files

_COLOUR = re.compile(r"--([a-z-]+):\s*light-dark\((#[0-9a-f]{6}),\s*(#[0-9a-f]{6})\)")


def asset(package: str, name: str) -> str:
    """The text of a file of bitfold.<package>, such as ("pages", "base.css")."""
    return files(f"bitfold.{package}").joinpath(name).read_text(encoding="utf-8")


def colours() -> dict[str, tuple[str, str]]:
    """The colours of base.css by name, each as "#rrggbb" in the light and in the dark theme."""
    return {name: (light, dark) for name, light, dark in _COLOUR.findall(asset("pages", "base.css"))}
