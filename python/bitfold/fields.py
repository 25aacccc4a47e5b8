"""A JSON object that somebody else wrote, taken value by value: each is what it must be, or one sentence says what it
is, and where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bitfold.shards import CheckpointError, is_whole

Read = TypeVar("Read")

_KINDS = {bool: "true or false", int: "a whole number", str: "a text", list: "a list", dict: "an object"}
_SHOWN = 100  # characters of a value
_MOST = (1 << 31) - 1  # of a size of a matrix


class Fields:
    """The values of an object by their keys. Every method raises CheckpointError where a value isn't what it must be.

    origin: the file, or what else has it; where: the object within it, "" for the whole.
    """

    def __init__(
        self, section: Mapping[str, Any], origin: Path | str, where: str = "quantization_config"
    ) -> None:
        self._section = section
        self._origin = origin
        self._where = where

    @property
    def name(self) -> str:
        """Of the object, for messages."""
        return f"{self._origin}: {self._where}" if self._where else str(self._origin)

    def __contains__(self, key: str) -> bool:
        return key in self._section

    def take(self, key: str, kind: type, default: Any = None, allowed: tuple[Any, ...] = ()) -> Any:
        """A value of type `kind`; `default` where there is none or null."""
        value = self._section.get(key)
        if value is None:
            value = default
        if value is None or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(key, _KINDS[kind])
        if allowed and value not in allowed:
            self.refuse(key, " or ".join(map(str, allowed)))
        return value

    def optional(self, key: str, kind: type) -> Any:
        """A value of type `kind`, or None where there is none or null."""
        return None if self._section.get(key) is None else self.take(key, kind)

    def read(self, key: str, reader: Callable[[str], Read], default: str | None = None) -> Read:
        """What `reader` makes of a text, which raises ValueError where it can't."""
        text = self.take(key, str, default)
        try:
            return reader(text)
        except ValueError as error:
            raise CheckpointError(f"{self._place(key)}: {error}") from None

    def size(self, key: str, default: float) -> float:
        """A number that isn't negative; `default` where there is no such key, 0 where it is null."""
        value = self._section.get(key, default) or 0
        if not _is_real(value) or value < 0:
            self.refuse(key, "a number that is at least 0")
        return float(value)

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number; `default` where there is none or null."""
        value: Any = self._section.get(key)
        value = default if value is None else value
        if not _is_real(value) or value <= 0:
            self.refuse(key, "a positive number")
        return float(value)

    def number(self, key: str) -> float:
        """A finite number."""
        value: Any = self._section.get(key)
        if not _is_real(value):
            self.refuse(key, "a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None where there is none or null."""
        return None if self._section.get(key) is None else self.number(key)

    def reals(self, key: str) -> list[float]:
        """A list of positive numbers."""
        values = self.take(key, list)
        if not all(_is_real(value) and value > 0 for value in values):
            self.refuse(key, "a list of positive numbers")
        return [float(value) for value in values]

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """So many finite numbers."""
        values = self.take(key, list)
        if len(values) != count or not all(map(_is_real, values)):
            self.refuse(key, f"a list of {count} numbers")
        return tuple(map(float, values))

    def sizes(self, key: str, count: int | None = None, least: int = 0) -> tuple[int, ...]:
        """So many whole numbers from `least` on; None: however many."""
        values = self.take(key, list)
        whole = all(is_whole(value) and least <= value <= _MOST for value in values)
        if not whole or count not in (None, len(values)):
            self.refuse(
                key, f"a list of {'' if count is None else f'{count} '}whole numbers from {least} to {_MOST}"
            )
        return tuple(values)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.take(key, list)
        if not all(isinstance(value, str) for value in values):
            self.refuse(key, "a list of texts")
        return tuple(values)

    def texts(self, key: str) -> dict[str, str]:
        """An object of texts by name; empty where there is none or null."""
        values = self.take(key, dict, {})
        if not all(isinstance(value, str) for value in values.values()):
            self.refuse(key, "texts by name")
        return dict(values)

    def section(self, key: str) -> Fields:
        """An object."""
        return self._inner(self.take(key, dict), key)

    def objects(self, key: str) -> dict[str, Fields]:
        """An object of objects by name."""
        values = self.take(key, dict)
        return {name: self._inner(value, f"{key}[{name!r}]") for name, value in values.items()}

    def entries(self, key: str) -> list[Fields]:
        """A list of objects."""
        values = self.take(key, list)
        return [self._inner(value, f"{key}[{number}]") for number, value in enumerate(values)]

    def refuse(self, key: str, wanted: str) -> None:
        """Raises CheckpointError: a value isn't what it must be."""
        is_what = f"is {shown(self._section[key])}" if key in self._section else "is missing"
        raise CheckpointError(f"{self._place(key)} {is_what}; it must be {wanted}")

    def check_group(self, group: int, key: str = "group_size") -> int:
        """Raises CheckpointError for a group that no format has; -1 is a scale a row."""
        if group != -1 and not 16 <= group <= 1 << 20:
            self.refuse(key, "-1 or at least 16")
        return group

    def _inner(self, section: object, key: str) -> Fields:
        if not isinstance(section, dict):
            raise CheckpointError(f"{self._place(key)} is {shown(section)}; it must be an object")
        return Fields(section, self._origin, f"{self._where}.{key}" if self._where else key)

    def _place(self, key: str) -> str:
        return f"{self.name}.{key}" if self._where else f"{self._origin}: {key}"


def shown(value: object) -> str:
    """A value in a message, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


def _is_real(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
