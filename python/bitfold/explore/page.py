"""The page put together: template, style, script and tables in one file that loads nothing."""

from __future__ import annotations

import json
import string

from bitfold._C import __version__
from bitfold.explore.tables import CHANNEL, COUNT, tables
from bitfold.outliers.columns import ACTIVATION_THRESHOLD
from bitfold.pages import asset

SCRIPTS = ("numbers.js", "draw.js", "features.js", "explore.js")


def render() -> str:
    """The page as HTML."""
    # In a script element "</" could end it; in JSON the escape means the same.
    data = json.dumps(tables(), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return string.Template(asset("explore", "explore.html")).substitute(
        css=asset("pages", "base.css") + asset("explore", "explore.css"),
        theme=asset("pages", "theme.html"),
        tables=data,
        version=__version__,
        count=COUNT,
        channel=CHANNEL,
        threshold=f"{ACTIVATION_THRESHOLD:g}",
        script="\n".join(asset("explore", name) for name in SCRIPTS),
    )
