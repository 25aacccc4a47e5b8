"""What the commands share: where output goes, progress, numbers as text.

Results go to stdout (with --json as one JSON object), everything else to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from bitfold import hf, hub
from bitfold.pipeline import REPORT_FILE
from bitfold.shards import read_json
from bitfold.text import estimate as estimate  # the commands take these three from here
from bitfold.text import natural as natural
from bitfold.text import size as size

_PIPE_WIDTH = 200  # columns where stdout is no terminal
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Device = Annotated[str, typer.Option(help="Where to compute.")]
Dtype = Annotated[
    str, typer.Option(help="Compute in float32, bfloat16 or float16; default: as the model is stored.")
]
Activations = Annotated[
    str,
    typer.Option(
        help="What layers do with their inputs: float, int8 (8 bits; of GGUF's blocks and int8 weights), llm-int8 ...; "
        "default: as the model says."
    ),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sentence(message: str) -> str:
    """A message as one sentence on one line."""
    text = " ".join(message.split())
    return text if text.endswith((".", "?", "!")) else text + "."


def print_json(data: object) -> None:
    """One JSON object on stdout; numbers that JSON has no name for become null."""
    print(json.dumps(_jsonable(data), indent=2, ensure_ascii=False))


def _jsonable(data: Any) -> Any:
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    if isinstance(data, dict):
        return {str(key): _jsonable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_jsonable(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if isinstance(data, (str, int, float, bool, type(None))) else str(data)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on stderr, gone when done; a function to call with (what, done, total)."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    ]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda what, done, total: bar.update(task, completed=done, total=total, what=what)


def table(*columns: str) -> Table:
    """A plain table; the first column is left-aligned and gives way where the terminal is narrow."""
    result = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    return result


def paragraph(text: str, indent: str = "") -> str:
    """Prose in lines of at most 79 columns, wherever it goes; indent: of all lines but the first."""
    return textwrap.fill(text, 79, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def parse_dtype(text: str, option: str = "--dtype") -> torch.dtype | None:
    """The dtype an option names, None for the default. Raises ValueError for another name."""
    if text and text not in DTYPES:
        raise ValueError(f"{option} is '{text}', it must be one of {', '.join(DTYPES)}")
    return DTYPES.get(text)


def parse_device(text: str) -> torch.device:
    """The device an option names. Raises ValueError where torch doesn't know or have it."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device is '{text}', which this torch doesn't have") from None
    return device


def load_model(path: Path, device: str, dtype: str, activations: str = "") -> nn.Module:
    """A quantized or an unquantized model, whichever a directory holds, or a GGUF file."""
    quiet_transformers()
    with err.status(f"loading {path}"):
        where, kind = parse_device(device), parse_dtype(dtype)
        if hub.is_quantized(path):
            return hub.load(path, device=where, dtype=kind, activations=activations or None)
        if activations not in ("", "float"):
            raise ValueError(
                f"--activations is '{activations}', but {path} is not quantized: it must be 'float'"
            )
        return hf.load_causal_lm(path, device=where, dtype=kind)


def say_cache(path: Path, given: str = "") -> None:
    """A remark where a checkpoint's formats were chosen for a budget along with a KV cache's, and it isn't the given
    one."""
    report = path / REPORT_FILE
    if not report.is_file():
        return
    allocation = read_json(report).get("allocation")
    cache = allocation.get("kv_cache") if isinstance(allocation, dict) else None
    if isinstance(cache, dict) and cache.get("quantized") and cache.get("format") != given:
        format = cache.get("format")
        say(
            f"note: the formats of {path} were chosen for a budget with a KV cache in {format}, and this runs "
            f"with one in {given or 'the dtype of the model'}: 'bitfold eval --kv {format}', or in Python "
            f"bitfold.QuantizedCache(model.config, '{format}')"
        )


def quiet_transformers() -> None:
    """No bars and warnings of transformers between ours."""
    logging = hf.require_transformers().utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def say(text: str) -> None:
    """A remark on stderr."""
    print(text, file=sys.stderr)
