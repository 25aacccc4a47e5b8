"""Times a whole model: a Llama of 1.1 B random parameters generates at batch 1 with a static cache.

    python bench/end_to_end.py --threads 2 --out bench/results/NAME.json

The model has TinyLlama's shape and is made in memory. Beside tokens per second stands what its linear layers
alone take: the same calls, on the same modules with the inputs that they had in one step, and nothing else.
The models take turns. Their weights exceed the caches that a CPU has today; nothing is rotated.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold import hf
from bitfold.bench.bars import BARS, verdicts
from bitfold.bench.clock import Spread
from bitfold.bench.machine import machine, versions
from torch import Tensor, nn

PROMPT = 16  # tokens
BASE = "torch bf16"
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Subject:
    """A model to time. linears: one call for each linear layer that a step runs, on the inputs of a step."""

    name: str
    model: Any
    linears: list[Callable[[], Tensor]]
    nbytes: int  # of the weights of those layers


def make_model(shape: dict[str, int]) -> Any:
    """A bf16 Llama of random weights that never ends by itself."""
    transformers = hf.require_transformers()
    config = transformers.LlamaConfig(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def subject(name: str, base: Any, prompt: Tensor, compiled: bool) -> Subject:
    """The model quantized with the recipe `name`, or as it is (BASE), after it has run once."""
    model = base
    if name != BASE:
        model = copy.deepcopy(base)
        model.__dict__.pop("_compiled_call", None)  # that of `base`, with its weights
        bitfold.quantize(model, name)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, bitfold.QuantLinear))]
    # The hook runs for the prompt and for each token; what the last token brought stays.
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].clone()))
        for layer in layers
    ]
    generate(model, prompt, 2)
    for hook in hooks:
        hook.remove()
    if compiled:  # hooks would have split the graph
        generate(model, prompt, 2, compiled)
    calls = [partial(layer, x) for layer, x in inputs.items()]  # a dict keeps the order of the calls
    nbytes = sum(tensor.nbytes for layer in layers for tensor in layer.parameters())
    return Subject(name, model, calls, nbytes)


class Stamps:
    """A streamer that notes when each token comes; transformers calls it with the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate(model: Any, prompt: Tensor, tokens: int, compiled: bool = False) -> float:
    """Seconds for each token after the first, greedy, with a static cache; compiled: the step by torch.compile."""
    stamps = Stamps()
    how: dict[str, Any] = {"disable_compile": True}
    if compiled:
        config = hf.require_transformers().CompileConfig(mode="default", dynamic=False)
        config._compile_all_devices = True  # without it transformers compiles on GPUs alone, and says nothing
        how = {"compile_config": config}
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        streamer=stamps,
        **how,
    )
    first, last = stamps.times[1], stamps.times[-1]
    return (last - first) / (len(stamps.times) - 2)


@torch.inference_mode()
def linears_alone(calls: list[Callable[[], Tensor]], passes: int) -> float:
    """Seconds for all linear layers once: the median of so many passes."""
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        for call in calls:
            call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(
    subjects: list[Subject], prompt: Tensor, tokens: int, rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    """A row for each model, of rounds in which they take turns; one more round comes first, uncounted."""
    steps: dict[str, list[float]] = {one.name: [] for one in subjects}
    alone: dict[str, list[float]] = {one.name: [] for one in subjects}
    for round in range(rounds + 1):
        for one in subjects:
            step = generate(one.model, prompt, tokens, compiled)
            linears = linears_alone(one.linears, max(3, tokens // 4))
            if round > 0:
                steps[one.name].append(step)
                alone[one.name].append(linears)
            print(
                f"{one.name}: {1 / step:.2f} tokens/s, {step * 1e3:.2f} ms, linears {linears * 1e3:.2f} ms",
                file=sys.stderr,
            )
    base = statistics.median(steps[BASE])
    rows = []
    for one in subjects:
        step, linears = Spread.of(steps[one.name]), Spread.of(alone[one.name])
        rows.append(
            {
                "op": "generate",
                "name": one.name,
                "kind": "torch" if one.name == BASE else "bitfold",
                "ms": step.as_ms(),
                "tokens_per_s": 1 / step.median,
                "over_torch": base / step.median,
                "linears": len(one.linears),
                "linears_ms": linears.as_ms(),
                # The pairs of a round shared the machine's state: their ratios, and the median of those.
                "over_linears": statistics.median(
                    a / b for a, b in zip(steps[one.name], alone[one.name], strict=True)
                ),
                "bytes": one.nbytes,
                "GB_per_s": one.nbytes / linears.median / 1e9,
            }
        )
    return rows


def profile(one: Subject, prompt: Tensor, tokens: int) -> str:
    """Which ops the time goes to, as torch's profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        generate(one.model, prompt, tokens)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["int4-g128", "nf4"])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a generation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--compile", action="store_true", help="compile the step, every model's")
    parser.add_argument("--profile", action="store_true", help="print the ops of each model as well")
    args = parser.parse_args()
    facts = machine()  # before the run is a load itself
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = make_model({**TINYLLAMA, "num_hidden_layers": args.layers})
    prompt = torch.randint(0, TINYLLAMA["vocab_size"], (1, PROMPT))
    subjects = [subject(name, base, prompt, args.compile) for name in (BASE, *args.recipes)]
    rows = measure(subjects, prompt, args.tokens, args.rounds, args.compile)
    if args.profile:
        for one in subjects:
            print(one.name, profile(one, prompt, args.tokens), sep="\n")
    report = {
        "schema": 1,
        "machine": facts,
        "versions": versions(),
        "settings": {
            "model": {**TINYLLAMA, "num_hidden_layers": args.layers},
            "parameters": sum(parameter.numel() for parameter in base.parameters()),
            "threads": args.threads,
            "prompt": PROMPT,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "cache": "static",
            "compiled": args.compile,
        },
        "rows": rows,
        "bars": verdicts(rows, [bar for bar in BARS if bar.op == "generate"]),
    }
    for row in rows:
        print(
            f"{row['name']:12}{row['tokens_per_s']:8.2f} tokens/s{row['over_torch']:7.2f}x torch"
            f"{row['ms']['median']:9.2f} ms a token, {row['over_linears']:.3f} of its {row['linears']} linears"
        )
    for verdict in report["bars"]:
        print(f"{verdict['bar']}: {verdict['measured']}, met: {verdict['met']} (at {verdict['at']})")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
