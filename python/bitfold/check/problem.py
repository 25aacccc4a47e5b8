"""What is found: faults, which are certain, and doubts, where the evidence isn't enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfold.shards import CheckpointError

Progress = Callable[[str, int, int], None]
"""Told after each module: its name, how many are done, and of how many."""


@dataclass(frozen=True)
class Problem:
    """A fault. kind: its name (docs/check.md lists them); where: tensor, module or file; found, wanted: the
    halves of the sentence; repair: what `--repair` does about it, "" if nothing is sure.
    """

    kind: str
    where: str
    found: str
    wanted: str
    repair: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; {self.wanted}"


@dataclass(frozen=True)
class Doubt:
    """What could be a fault and could be sound, or could not be looked at; nothing is refused for it."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass
class Report:
    """path: what was examined; owner: whose checkpoint it is ("" where that is not known); modules: how many
    quantized ones were looked at. findings, labels, alone are what a repair goes by: of modules, what keys of
    quantization_config must be, and whether zero points were packed each by itself.
    """

    path: Path
    owner: str = ""
    modules: int = 0
    problems: list[Problem] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    alone: bool = False

    @property
    def sound(self) -> bool:
        return not self.problems

    def fault(self, kind: str, where: object, found: str, wanted: str, repair: str = "") -> None:
        self.problems.append(Problem(kind, str(where), found, wanted, repair))

    def misread(self, file: Path, error: CheckpointError) -> None:
        """A configuration that can't be: what reading it said."""
        found, _, wanted = str(error).removeprefix(str(file)).lstrip(": ").partition("; ")
        self.fault("configuration", file, found, wanted or "it must be one that bitfold reads")

    def doubt(self, where: object, text: str) -> None:
        self.doubts.append(Doubt(str(where), text))

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "owner": self.owner,
            "modules": self.modules,
            "sound": self.sound,
            "problems": [{**vars(problem), "sentence": str(problem)} for problem in self.problems],
            "doubts": [{**vars(doubt), "sentence": str(doubt)} for doubt in self.doubts],
        }
