"""Times the generation of tokens from a whole GGUF beside llama-bench, in turns.

    python bench/gguf_generate.py --recipe q4_k_m --threads 2 --out bench/results/NAME.json

The model has 1.1 B random parameters (bench/gguf_model.py), quantized by `bitfold quantize` in a temporary folder.
bitfold runs it as users do, with `bitfold.load` and transformers' generate at batch 1 with a static cache; llama-bench
as it does by itself, with matrices repacked for its kernels and without. Before anything is timed, bitfold's logits are
compared with those of the same model with its weights decoded to fp32.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfold
import gguf_model
import torch
from bitfold.bench import ggml
from bitfold.bench.bars import GENERATE_BARS, verdicts
from bitfold.bench.clock import Spread
from bitfold.bench.machine import machine, versions
from end_to_end import PROMPT, generate
from gguf_file import program
from torch import Tensor, nn

# Relative norm error of the logits; the models' layers add up their rounding.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 1e-1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.inference_mode()
def check(model: Any, prompt: Tensor, name: str) -> float:
    """Relative error of the prompt's logits against the model with decoded weights, in fp32. Ends the run if large."""
    exact = copy.deepcopy(model).float()
    for parent in list(exact.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, bitfold.QuantLinear):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight = nn.Parameter(module.qtensor.decode(), requires_grad=False)
                setattr(parent, child, plain)
    wanted = exact(prompt).logits.double()
    error = float((model(prompt).logits.double() - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE[name]:
        raise SystemExit(
            f"{name} is wrong: relative error {error:.2e} of the logits, at most {TOLERANCE[name]:.0e}"
        )
    print(f"{name}: relative error of the logits {error:.1e}", file=sys.stderr)
    return error


def llama_bench(path: Path, threads: int, tokens: int, repack: bool) -> float:
    """Seconds for each token, of llama-bench's own measurement at the depth of the prompt."""
    command = [program("llama-bench"), "-m", str(path), "-t", str(threads), "-p", "0", "-n", str(tokens)]
    command += ["-d", str(PROMPT), "-r", "1", "-o", "json", "--repack", str(int(repack))]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = json.loads(found)
    return 1 / row["avg_ts"]


def write_model(folder: Path, recipe: str, layers: int) -> Path:
    source, path = folder / "model-f16.gguf", folder / f"model-{recipe}.gguf"
    gguf_model.write(source, layers)
    command = [sys.executable, "-m", "bitfold", "quantize", str(source), str(path), "--recipe", recipe]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    source.unlink()
    return path


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds for each token; the contestants take turns, and one more round comes first, uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            step = call()
            print(f"{name}: {1 / step:.2f} tokens/s", file=sys.stderr)
            if round > 0:
                seconds[name].append(step)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--recipe", default="q4_k_m")
    parser.add_argument("--model", type=Path, help="a quantized GGUF that exists, in place of the random one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=gguf_model.LAYERS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    args = parser.parse_args()
    facts = machine()  # before the run is a load itself
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bitfold-bench-") as folder:
        path = args.model or write_model(Path(folder), args.recipe, args.layers)
        models = {name: load(path, DTYPES[name]) for name in args.dtypes}
        prompt = torch.randint(3, gguf_model.VOCAB, (1, PROMPT))
        errors = {name: check(model, prompt, name) for name, model in models.items()}
        calls: dict[str, Callable[[], float]] = {
            f"bitfold {name}": lambda m=model: generate(m, prompt, args.tokens)
            for name, model in models.items()
        }
        for name, repack in (("llama.cpp", True), ("llama.cpp, not repacked", False)):
            calls[name] = lambda r=repack: llama_bench(path, args.threads, args.tokens, r)
        seconds = measure(calls, args.rounds)
    best = min(statistics.median(found) for name, found in seconds.items() if name.startswith("llama.cpp"))
    rows = [row(name, found, best, errors) for name, found in seconds.items()]
    report = {
        "schema": 1,
        "machine": facts,
        "versions": {**versions(), "llama.cpp": ggml.library().version},
        "settings": {
            name: getattr(args, name) for name in ("recipe", "threads", "tokens", "rounds", "layers")
        },
        "rows": rows,
        "bars": verdicts(rows, GENERATE_BARS),
    }
    for entry in rows:
        print(
            f"{entry['name']:26}{entry['tokens_per_s']:8.2f} tokens/s{entry['ms']['median']:9.2f} ms a token"
            f"{entry['over_llama']:7.2f}x llama.cpp's best"
        )
    for verdict in report["bars"]:
        print(f"{verdict['bar']}: {verdict['measured']}, wanted {verdict['wanted']}, met: {verdict['met']}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def load(path: Path, dtype: torch.dtype) -> Any:
    model: Any = bitfold.load(path, dtype=dtype)
    model.generation_config.eos_token_id = None  # random weights would end anywhere
    return model


def row(name: str, seconds: list[float], best: float, errors: dict[str, float]) -> dict[str, Any]:
    step = Spread.of(seconds)
    return {
        "op": "generate",
        "name": name,
        "kind": "bitfold" if name.startswith("bitfold") else "peer",
        "ms": step.as_ms(),
        "tokens_per_s": 1 / step.median,
        "over_llama": best / step.median,
        "error": errors.get(name.removeprefix("bitfold ")),
    }


if __name__ == "__main__":
    main()
