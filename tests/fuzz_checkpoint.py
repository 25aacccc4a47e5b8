"""Damaged model directories for the commands: each must do its work, name the faults, or end in one sentence.

    python tests/fuzz_checkpoint.py --directories 10000

A tiny model, plain and in each kind of checkpoint that bitfold reads, has values of its JSON files or of the headers of
its safetensors files replaced by others, removed, renamed or copied over each other; then a command gets it. What a
directory number means is fixed by the seed, so that a finding can be repeated: `--first N --directories 1`.

This file is also what test_fuzz_checkpoint.py uses for the short run of every day. Files of GGUF have one of their own,
fuzz_gguf.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitfold
import tiny
import torch
from bitfold.cli.app import run
from bitfold.convert import convert_checkpoint
from fuzz_gguf import Finding

LONGEST_MESSAGE = 800  # transformers' reasons and two paths among it
CONVERTED = {
    "int4-g32": ("gptq", "compressed-tensors"),
    "int4-g64-asym": ("gptq", "awq"),
    "nf4": ("bitsandbytes",),
    "nf4-dq": ("bitsandbytes",),
    "int8": ("compressed-tensors",),
    "fp8": ("compressed-tensors",),
    "llm-int8": (),
    "q4_0": (),
}
"""Formats and recipes of the model, and whose checkpoints are made of them."""
COMMANDS = (
    "inspect {model}",
    "check {model}",
    "plan {model}",
    "outliers {model} --text {text}",
    "quantize {model} {out} --recipe int4-g32",
    "quantize {model} {out} --recipe int4-g32 --dry-run",
    "quantize {model} {out}.gguf --recipe q4_0",
    "convert {model} {out}",
    "convert {model} {out} --to gptq",
    "convert {model} {out} --to compressed-tensors",
    "convert {model} {out} --to bitsandbytes --allow-lossy",
    "convert {model} {out}.gguf",
    "eval {model} --text {text} --context 32",
    "generate {model} --prompt x --max-new-tokens 2",
    "report {model} --output {out}.html --base {base} --text {text}",
)
OTHERS = (
    *(None, True, False, 0, 1, -1, 3, 7, 16, 1 << 20, 1 << 31, 1 << 63, 1 << 64, 10**30),
    *(0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x", "int4-g32", "float16", "..", "/", "é\n"),
    *([], {}, [1], ["a"], [None], [[]], {"a": 1}, {"": {}}, {"a": {"b": []}}),
)
SMALL = ("num_hidden_layers",)
"""Of which transformers makes as many as it is told, however long that takes."""


# ---- sound directories ----


def sound_models(folder: Path) -> list[Path]:
    """Directories in `folder`, the first unquantized in one file."""
    plain = tiny.write_llama(folder / "plain", torch.float16, layers=1)
    made = [plain, tiny.write_llama(folder / "shards", torch.float16, layers=1, shard="50KB")]
    for recipe, owners in CONVERTED.items():
        made.append(folder / recipe)
        bitfold.quantize_checkpoint(plain, made[-1], recipe)
        for owner in owners:
            made.append(folder / f"{recipe}-{owner}")
            convert_checkpoint(folder / recipe, made[-1], to=owner)
    return made


# ---- damage ----


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values lie in JSON, as the keys that lead to them; of a list the first few."""
    if path:
        yield path
    for key in data if isinstance(data, dict) else range(min(len(data), 4)) if isinstance(data, list) else ():
        yield from places(data[key], (*path, key))


def value_at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def damaged(data: Any, rng: random.Random) -> Any:
    """One to three values replaced, removed, renamed or copied over another one; rarely the whole."""
    if rng.random() < 0.02:
        return copy.deepcopy(rng.choice(OTHERS))
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(data))
        sections = [path for path in found if path[0] == "quantization_config"]
        if not found:
            break
        path = rng.choice(sections if sections and rng.random() < 0.6 else found)
        around, key, kind = value_at(data, path[:-1]), path[-1], rng.random()
        if kind < 0.3:
            del around[key]
        elif kind < 0.8:
            around[key] = rng.choice((1, None, "x")) if key in SMALL else copy.deepcopy(rng.choice(OTHERS))
        elif kind < 0.9 and key not in SMALL:
            around[key] = copy.deepcopy(value_at(data, rng.choice(found)))
        elif isinstance(around, dict):
            around[rng.choice(("x", "", f"{key}x"))] = around.pop(key)
    return data


def damage(model: Path, rng: random.Random) -> None:
    """One file of a directory: a JSON file, or the header of a safetensors file."""
    configurations = [file for file in model.glob("*.json") if not file.name.startswith("tokenizer")]
    weights = list(model.glob("*.safetensors"))
    file = rng.choice([model / "config.json"] * 3 + sorted(configurations) + sorted(weights) * 2)
    if file.suffix == ".json":
        file.write_text(json.dumps(damaged(json.loads(file.read_text()), rng)))
        return
    held = file.read_bytes()
    end = 8 + int.from_bytes(held[:8], "little")
    header = json.dumps(damaged(json.loads(held[8:end]), rng)).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + held[end:])


# ---- what must come of it ----


def outcome(sound: list[Path], number: int, seed: int, folder: Path) -> str:
    """Damages a copy of a directory and gives it to a command; `folder` is empty before and after.

    Returns "done", "faults" (of `check`) or "refused". Raises Finding, of what isn't an error for users too.
    """
    rng = random.Random(f"{seed}-{number}")
    source, command = rng.choice(sound), rng.choice(COMMANDS)
    model = Path(shutil.copytree(source, folder / "model"))
    damage(model, rng)
    text = folder / "text.txt"
    text.write_text(tiny.TEXT)
    before = {*folder.rglob("*")}
    words = command.format(model=model, out=folder / "out", base=sound[0], text=text)
    told = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(told),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = run(words.split())
        left = {*folder.rglob("*")} - before
    except Exception as error:
        raise Finding(f"{source.name}, {command}: {type(error).__name__}") from error
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if code != 2:
        return "faults" if code else "done"
    *_, last = told.getvalue().splitlines() or [""]
    if not last.startswith("error: ") or not last.endswith((".", "?")) or len(last) > LONGEST_MESSAGE:
        raise Finding(f"{source.name}, {command}: the message is no sentence: {told.getvalue()[-2000:]!r}")
    if left:
        raise Finding(f"{source.name}, {command}: left behind: {sorted(left)}; {last}")
    return "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directories", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    findings: dict[str, str] = {}
    slowest = (0.0, args.first)
    with tempfile.TemporaryDirectory() as models, tempfile.TemporaryDirectory() as folder:
        sound = sound_models(Path(models))
        for number in range(args.first, args.first + args.directories):
            start = time.perf_counter()
            try:
                counts[outcome(sound, number, args.seed, Path(folder))] += 1
            except Finding as error:
                counts["findings"] += 1
                cause = error.__cause__
                place = traceback.extract_tb(cause.__traceback__)[-1] if cause else None
                kind = f"{cause!r} in {place.filename}, {place.lineno}" if place else str(error)
                findings.setdefault(kind, f"directory {number}: {''.join(traceback.format_exception(error))}")
            slowest = max(slowest, (time.perf_counter() - start, number))
    print(*findings.values(), sep="\n")
    print(
        f"directories from {args.first} on, seed {args.seed}: {dict(counts)}; the slowest, {slowest[1]}, took "
        f"{slowest[0]:.1f} s"
    )
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
