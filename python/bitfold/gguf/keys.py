"""The metadata of a GGUF file, value by value: each is what it must be, or one sentence says what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfold.shards import CheckpointError

if TYPE_CHECKING:  # the plan of a configuration needs no gguf package
    from bitfold.gguf.library import GGUFValue

_MOST = (1 << 31) - 1  # of a number that counts something


class Keys:
    """Values by the rest of their keys behind a prefix.

    Every method takes a default for a key that isn't there, None for a key that must be, and raises CheckpointError for
    a value of another kind or out of range.
    """

    def __init__(self, metadata: Mapping[str, GGUFValue], prefix: str) -> None:
        self._prefix = prefix
        self._values = {
            key.removeprefix(prefix): value.value for key, value in metadata.items() if key.startswith(prefix)
        }

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """A whole number within bounds."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._error(key, value, f"a whole number from {least} to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number. Of a float32 the shortest decimal that rounds to it."""
        value = self._take(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self._error(key, value, "a positive number")
        return shortest(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key, default)
        if not isinstance(value, str) or not _is_unicode(value):
            raise self._error(key, value, "a text")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        values = self._take(key, None)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._error(key, values, "a list of texts")
        for i, value in enumerate(values):
            if not _is_unicode(value):
                raise CheckpointError(f"number {i} of the file's {self._prefix}{key} is no UTF-8: {value!a}")
        return values

    def numbers(self, key: str, default: list[float] | None = None) -> list[float]:
        """A list of finite numbers."""
        values = self._take(key, default)
        kinds = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
        if not kinds or not all(map(math.isfinite, values)):
            raise self._error(key, values, "a list of numbers")
        return values

    def _take(self, key: str, default: Any) -> Any:
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointError(f"the file has no {self._prefix}{key}")
        return value

    def _error(self, key: str, value: object, wanted: str) -> CheckpointError:
        shown = ascii(value)
        shown = shown if len(shown) <= 60 else shown[:60] + " ..."
        return CheckpointError(f"the file's {self._prefix}{key} is {shown}; it must be {wanted}")


def shortest(value: float) -> float:
    """A float32's value as the shortest decimal that rounds to it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _is_unicode(text: str) -> bool:
    """Whether it was UTF-8 in the file: other bytes come as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True
