"""The command `bitfold`, one file a command; typer and rich (the extra `cli`) are imported when it runs."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line and exit: 0; 2 for what the user can mend; 130 interrupted; 143 terminated."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half done is cleared away
    try:
        from bitfold.cli.app import run
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        print("error: the command line needs typer and rich: run pip install 'bitfold[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))
