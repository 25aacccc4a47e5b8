"""Which versions of the libraries around bitfold it works with: one table."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import torch


class MissingExtraError(ImportError):
    """A library that bitfold needs for this is not installed, or of the wrong version; the message says what to do."""


@dataclass(frozen=True)
class Support:
    """A library whose inner workings bitfold builds on.

    extra: of bitfold's, that brings it; first: the first version that works; below: the first that is not known to;
    tested: those that the tests were run with.
    """

    library: str
    extra: str
    first: str
    below: str
    tested: tuple[str, ...]

    def check(self, purpose: str, version: str) -> None:
        """Raises MissingExtraError unless a version lies in the range; a pre-release counts as what it precedes."""
        if not _numbers(self.first) <= _numbers(version) < _numbers(self.below):
            raise MissingExtraError(
                f"{purpose} needs {self.library} {self.first} or newer and below {self.below}, not {version} "
                f"(tested: {', '.join(self.tested)}): run pip install -U 'bitfold[{self.extra}]'"
            )

    def require(self, purpose: str) -> Any:
        """The module of the library; purpose: what needs it, as a message begins.

        Raises MissingExtraError where it isn't installed, or of a version that bitfold doesn't work with.
        """
        try:
            module = importlib.import_module(self.library)
        except ModuleNotFoundError as error:
            if error.name != self.library:
                raise  # it is there, and lacks something of its own
            raise MissingExtraError(
                f"{purpose} needs {self.library}: run pip install 'bitfold[{self.extra}]'"
            ) from None
        self.check(purpose, module.__version__)
        return module


def installed(library: str) -> str | None:
    """The version of a library that is installed, by its name on PyPI; None where it isn't. torch's with its build, as
    2.13.0+cu130, which the metadata of its wheel may leave out."""
    if library == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """(5, 12, 1) of "5.12.1": the numbers at the front."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


TRANSFORMERS = Support("transformers", "hf", "5.0", "6", ("5.24.0",))
# As a quantization method of transformers bitfold stands in the middle of how it loads a model, which changes often.
FROM_PRETRAINED = Support("transformers", "hf", "5.20", "6", ("5.20.2", "5.22.2", "5.23.0", "5.24.0"))
KV_CACHE = Support("transformers", "hf", "5.23", "6", ("5.24.0",))
PEFT = Support("peft", "peft", "0.19", "1", ("0.19.1", "0.20.0", "0.21.2"))
