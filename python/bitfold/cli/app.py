"""The commands put together, and what becomes of their errors."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bitfold import __version__
from bitfold.cli.bench import bench
from bitfold.cli.check import check
from bitfold.cli.console import sentence
from bitfold.cli.convert import convert
from bitfold.cli.doctor import doctor
from bitfold.cli.eval import evaluate
from bitfold.cli.explain import explain
from bitfold.cli.explore import explore
from bitfold.cli.generate import generate
from bitfold.cli.imatrix import imatrix
from bitfold.cli.inspect import inspect
from bitfold.cli.outliers import outliers
from bitfold.cli.plan import plan
from bitfold.cli.quantize import quantize
from bitfold.cli.recipes import recipes
from bitfold.cli.report import report
from bitfold.cli.sensitivity import sensitivity
from bitfold.versions import MissingExtraError

# click's exceptions: newer releases of typer carry click inside, older ones import it.
_click = importlib.import_module(typer.BadParameter.__module__)

app = typer.Typer(
    name="bitfold",
    help="Fold the weights of a language model into fewer bits, and compute with them directly.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("recipes")(recipes)
# A negative number is no option.
app.command("explain", context_settings={"ignore_unknown_options": True})(explain)
app.command("plan")(plan)
app.command("quantize")(quantize)
app.command("sensitivity")(sensitivity)
app.command("outliers")(outliers)
app.command("imatrix")(imatrix)
app.command("convert")(convert)
app.command("check")(check)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("report")(report)
app.command("explore")(explore)
app.command("inspect")(inspect)
app.command("bench")(bench)
app.command("doctor")(doctor)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"bitfold {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version.")] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    What a user can mend (ValueError, OSError, a missing extra, a wrong option) is one sentence on stderr and
    exit code 2; BITFOLD_TRACEBACK=1 shows where it came from. Anything else is a bug of bitfold and keeps its
    traceback.
    """
    try:
        return typer.main.get_command(app).main(list(arguments), "bitfold", standalone_mode=False) or 0
    except _click.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except _click.ClickException as error:
        return _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(
            f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except (ValueError, MissingExtraError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    if os.environ.get("BITFOLD_TRACEBACK"):
        traceback.print_exc()
    print(f"error: {sentence(message)}", file=sys.stderr)
    return 2
