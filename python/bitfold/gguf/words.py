"""Names out of files, fit for sentences."""

from __future__ import annotations

_LONGEST = 64  # characters; names of tensors have fewer


def quoted(name: str) -> str:
    """A name in quotes, on one line and not too long, whatever a damaged file makes of it."""
    return repr(name if len(name) <= _LONGEST else name[:_LONGEST] + "...")
