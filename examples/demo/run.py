"""Quantize the demo model with several recipes and print what each costs and what it saves.

    python examples/demo/run.py                   about two minutes on two cores
    python examples/demo/run.py --tokens 0        on all of heldout.txt
    python examples/demo/run.py --keep DIR        keep the quantized models
    python examples/demo/run.py --recipes all --json python/bitfold/data/demo-kl.json
                                                  every preset, and the figures that `bitfold recipes` shows

Every model goes the way of a real one: quantized from its directory into another, loaded from there, compared
with the 16-bit model (computed in float32, for what is quantized alone is to differ: weights, and of llm-int8
inputs too) on text it has not seen, and made to write.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import bitfold
import torch
from bitfold import hf
from bitfold.cli.doctor import diagnose
from bitfold.evaluate import Comparison, Estimate, compare_all, cut, default_context
from bitfold.generate import Generation, generate
from bitfold.quantize import QuantizationSummary
from torch import nn

HERE = Path(__file__).resolve().parent
RECIPES = (
    "int8",
    "llm-int8",
    "fp8",
    "int4-mixed",
    "int4-g32",
    "int4-g128-asym",
    "int4-g128",
    "nf4",
    "nf4-dq",
    "fp4",
    "int3-g64",
    "int2-g64",
    "gptq-int4-g128",
    "gptq-int3-g64",
)
CALIBRATION = {"samples": 64, "sequence_length": 512}  # of the second half of heldout.txt
PROMPT = "def main("
DTYPE = torch.float32


@dataclass(frozen=True)
class Result:
    """One recipe: what quantizing told, and the model that came of it."""

    summary: QuantizationSummary
    model: nn.Module
    generation: Generation


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize the demo model with several recipes.")
    parser.add_argument(
        "--tokens",
        type=int,
        default=8192,
        help="tokens of heldout.txt to measure on; 0: all, with those that some recipes are calibrated on",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for the quantized models (default: a temporary one)"
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="recipes to try; all: every preset")
    parser.add_argument("--json", type=Path, help="file for the figures, with machine and commit")
    args = parser.parse_args()
    recipes = tuple(bitfold.RECIPES) if list(args.recipes) == ["all"] else tuple(args.recipes)
    if args.keep is not None:
        run(args.keep, recipes, args.tokens, args.json)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), recipes, args.tokens, args.json)


def run(folder: Path, recipes: tuple[str, ...], tokens: int, json_file: Path | None = None) -> None:
    """Quantize, measure, print; write the figures where a file is given."""
    start = time.perf_counter()
    source = HERE / "model"
    hf.require_transformers().utils.logging.disable_progress_bar()
    tokenizer = hf.load_tokenizer(source)
    base = hf.load_causal_lm(source, dtype=DTYPE)
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    results = {}
    for recipe in recipes:
        summary = quantize(source, folder / recipe, recipe, text[len(text) // 2 :])
        model = bitfold.load(folder / recipe, dtype=DTYPE)
        generate(model, tokenizer, PROMPT, max_new_tokens=4)  # warm up
        results[recipe] = Result(summary, model, generate(model, tokenizer, PROMPT, max_new_tokens=48))
    generate(base, tokenizer, PROMPT, max_new_tokens=4)
    base_generation = generate(base, tokenizer, PROMPT, max_new_tokens=48)

    windows = cut(text, tokenizer, context=default_context(base), dtype=DTYPE, max_tokens=tokens or None)
    print(f"model: {source.name}, protocol: {windows.protocol}\n")
    models = {recipe: result.model for recipe, result in results.items()}
    comparisons = compare_all(base, models, windows)
    print_table(results, comparisons, base_generation)
    if json_file is not None:
        json_file.write_text(json.dumps(figures(results, comparisons), indent=1) + "\n", encoding="utf-8")
    print(f"\nfp16:       {one_line(base_generation)}")
    for recipe in [recipe for recipe in ("int4-mixed", "int4-g128") if recipe in results] or recipes[:1]:
        print(f"{recipe + ':':<11} {one_line(results[recipe].generation)}")
    print(f"\n({time.perf_counter() - start:.0f} s)")


def quantize(source: Path, target: Path, recipe: str, text: str) -> QuantizationSummary:
    """One recipe; text: what those that need one are calibrated on."""
    if not bitfold.recipes.get(recipe).needs_calibration:
        return bitfold.quantize_checkpoint(source, target, recipe, force=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.txt"
        file.write_text(text, encoding="utf-8")
        return bitfold.quantize_calibrated(source, target, recipe, file, force=True, **CALIBRATION)


def figures(results: dict[str, Result], comparisons: dict[str, Comparison]) -> dict[str, object]:
    """Sizes and distances as JSON, and where they were measured. No speeds: they belong to one machine."""
    first = next(iter(comparisons.values()))
    recipes = {}
    for name, result in results.items():
        comparison, summary = comparisons[name], result.summary
        recipes[name] = {
            "bits_per_weight": 8
            * sum(module.bytes_after for module in summary.modules)
            / summary.quantized_parameters,
            "bytes": summary.bytes_after,
            "mean_kl": comparison.mean_kl.value,
            "mean_kl_error": comparison.mean_kl.error,
            "p99_kl": comparison.p99_kl.value,
            "top1": comparison.top1.value,
            "perplexity": comparison.model.perplexity.value,
        }
    return {
        "what": "examples/demo/model quantized, compared with itself in 16 bits on examples/demo/heldout.txt",
        "command": "python examples/demo/run.py --recipes all --json python/bitfold/data/demo-kl.json",
        "commit": commit(),
        "machine": machine(),
        "bitfold": bitfold.__version__,
        "torch": torch.__version__,
        "isa": diagnose()["cpu"]["isa"],
        "threads": torch.get_num_threads(),
        "protocol": str(first.protocol),
        "base_bytes": next(iter(results.values())).summary.bytes_before,
        "base_perplexity": first.base.perplexity.value,
        "recipes": recipes,
    }


def commit() -> str:
    """The commit that is checked out, "unknown" outside of one."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> str:
    """The CPU's name where the system tells it (Linux), else its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_table(
    results: dict[str, Result], comparisons: dict[str, Comparison], base_generation: Generation
) -> None:
    """One row for the base and one for each recipe; "bits" are those of a quantized weight, scales included."""
    first = next(iter(comparisons.values())).base
    size = next(iter(results.values())).summary.bytes_before
    print(
        f"{'recipe':<17}{'MB':>6}{'bits':>7}{'perplexity':>17}{'mean KL (1e-3 nats)':>21}{'99 % KL':>9}"
        f"{'same top-1':>12}{'error':>8}{'tokens/s':>10}"
    )
    print(
        f"{'fp16 (base)':<17}{size / 1e6:>6.2f}{16:>7.2f}{with_error(first.perplexity, 2):>17}{'':>50}"
        f"{base_generation.tokens_per_second or 0:>10.0f}"
    )
    for recipe, result in results.items():
        comparison = comparisons[recipe]
        modules = result.summary.modules
        bits = 8 * sum(module.bytes_after for module in modules) / result.summary.quantized_parameters
        worst = max(module.relative_rmse for module in modules)
        print(
            f"{recipe:<17}{result.summary.bytes_after / 1e6:>6.2f}{bits:>7.2f}"
            f"{with_error(comparison.model.perplexity, 2):>17}"
            f"{with_error(scaled(comparison.mean_kl, 1e3), 3):>21}{comparison.p99_kl.value:>9.4f}"
            f"{comparison.top1.value:>12.1%}{worst:>8.2%}{result.generation.tokens_per_second or 0:>10.0f}"
        )
    print(
        "\nerror: of the weights of the worst layer, norm of the change over norm; tokens/s: one at a time, float32"
    )


def with_error(estimate: Estimate, digits: int) -> str:
    if estimate.error is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, None if estimate.error is None else estimate.error * factor)


def one_line(generation: Generation) -> str:
    return (generation.prompt + generation.text).strip().replace("\n", "\\n")


if __name__ == "__main__":
    main()
