"""The demo model with outlier features: which channels and which factor, and what 8 bits lose then.

    python bench/outliers.py --judge --out bench/results/outliers-demo.json
    python bench/outliers.py --choose --out bench/results/outliers-demo.json

First the choice, on 4088 tokens of the second half of heldout.txt. Channels of the residual stream are ranked by their
mean magnitude behind the norms in front of linear layers, each norm's in units of its mean. With the first of them,
one more in each row, made FACTORS times larger (examples/demo/outliers.py), int8 with one step for each row of the
inputs and of the weights is measured; the fewest channels and then the smallest factor by which it loses more than
CHOSEN_LOSS are those that the script of the demo should have.

Then the verdict, on the first 4088 tokens, of three models that compute the same: the demo model, the one with outlier
features, and that with the inputs of output and down projections below the threshold too ("quiet"), where hardly
anything but the outlier features is left to 16 bits. Each contestant is a checkpoint, quantized and loaded as a user
does it and calibrated, where it has to be, on the second half of the text; or, "in float32", a way of
bitfold.outliers.ways, rounded values multiplied in float32. All run in float32.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold import hf
from bitfold.bench.machine import machine, versions
from bitfold.calibration.mappings import folds
from bitfold.evaluate import Comparison, Windows, compare_all, cut, perplexity
from bitfold.outliers.columns import ACTIVATION_THRESHOLD
from bitfold.outliers.measure import measure
from bitfold.outliers.ways import WAYS, prepare
from bitfold.recipes import Recipe, Rule
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
COUNTS, FACTORS = (1, 2, 4, 8), (32.0, 64.0)
CHOSEN_LOSS = 0.33
TOKENS = {"chosen": 4088, "judged": 4088}
CALIBRATION = {"samples": 16, "sequence_length": 512}
BARS = {"naive": 0.20, "exact": 0.005}

W8A8 = Recipe("w8a8", "", (Rule("*", "int8-channel-sfp32", activations="int8"),))  # type: ignore[arg-type]
CHECKPOINTS: dict[str, str | Recipe] = {
    "int8 weights, inputs as they are": "int8-channel-sfp32",
    "W8A8": W8A8,
    "LLM.int8() without exact outliers": "llm-int8",
}
EXACT = "LLM.int8() with exact outliers"


def script() -> Any:
    """examples/demo/outliers.py as a module."""
    spec = importlib.util.spec_from_file_location("demo_outliers", DEMO / "outliers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- ways in float32 ----


class InWay(nn.Module):
    """A linear layer in one of WAYS; a batch is one call."""

    def __init__(self, weight: Tensor, way: str) -> None:
        super().__init__()
        self._run = prepare(WAYS[way], weight.detach(), ACTIVATION_THRESHOLD)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def in_way(model: nn.Module, way: str) -> nn.Module:
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, InWay(layer.weight, way))
    return model


# ---- the choice ----


@torch.no_grad()
def ranked(model: Any, windows: Windows) -> list[int]:
    """Channels of the residual stream, the largest first."""
    seen: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[module] = seen.get(module, 0) + output[0].abs().sum(0, dtype=torch.float64)

    norms = [f.source for b in model.model.layers for f in folds(b, model.config)]
    handles = [norm.register_forward_hook(hook) for norm in norms if not isinstance(norm, nn.Linear)]
    for ids in windows.ids:
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sum(sums / sums.mean() for sums in seen.values()).argsort(descending=True).tolist()


def choose(demo: Any, base: nn.Module, windows: Windows) -> dict[str, Any]:
    """The grid of what int8 loses, and what follows from it."""
    order = ranked(base, windows)
    before = perplexity(base, windows).perplexity.value
    grid, chosen = [], None
    for count in COUNTS:
        for factor in FACTORS:
            wide = copy.deepcopy(base)
            demo.widen(wide, order[:count], factor)
            loss = perplexity(in_way(wide, "int8"), windows).perplexity.value / before - 1
            grid.append({"channels": order[:count], "factor": factor, "loss": loss})
            print(f"{count} channels, factor {factor:g}: {loss:.2%}", file=sys.stderr)
            if chosen is None and loss > CHOSEN_LOSS:
                chosen = grid[-1]
    if chosen is None:
        raise ValueError(f"none of the channels and factors makes int8 lose {CHOSEN_LOSS:.0%}")
    in_script = {"channels": list(demo.CHANNELS), "factor": demo.FACTOR}
    if in_script != {key: chosen[key] for key in in_script}:
        raise ValueError(f"examples/demo/outliers.py has {in_script}; it must have {chosen}")
    return {"protocol": str(windows.protocol), "grid": grid, "chosen": chosen, "versions": versions()}


# ---- the verdict ----


def row(name: str, found: Comparison) -> dict[str, Any]:
    before, after = found.base.perplexity.value, found.model.perplexity.value
    return {
        "name": name,
        "perplexity": after,
        "base_perplexity": before,
        "loss": after / before - 1,
        "mean_kl": found.mean_kl.value,
        "mean_kl_error": found.mean_kl.error,
        "top1": found.top1.value,
    }


def judge(work: Path, source: Path, text: Path, base: nn.Module, windows: Windows) -> dict[str, Any]:
    """All contestants of one model; base: the demo model, which computes the same."""
    model = hf.load_causal_lm(source, dtype=torch.float32)
    contestants = {"not quantized": model, **{f"{way}, in float32": in_way(model, way) for way in WAYS}}
    for name, recipe in CHECKPOINTS.items():
        target = work / "quantized"
        bitfold.quantize_checkpoint(source, target, recipe, force=True)
        contestants[name] = bitfold.load(target, dtype=torch.float32)
    summary = bitfold.quantize_calibrated(source, target, "llm-int8", text, force=True, **CALIBRATION)
    contestants[EXACT] = bitfold.load(target, dtype=torch.float32)
    exact = [module.calibration.outliers / module.shape[1] for module in summary.modules]  # type: ignore
    comparisons = compare_all(base, contestants, windows, progress=lambda n, m: print(n, m, file=sys.stderr))
    found = measure(source, torch.stack(windows.ids), ways={})
    sixteen = [one.sixteen for one in found.inputs]
    return {
        "model": source.name,
        "rows": [row(name, comparison) for name, comparison in comparisons.items()],
        "in_sixteen_bits": {"mean": sum(sixteen) / len(sixteen), "largest": max(sixteen)},
        "exact": {"mean": sum(exact) / len(exact), "largest": max(exact)},
        "systematic_channels": [c.index for c in found.recurring if c.is_systematic],
    }


# ---- the report ----


def grid(choice: dict[str, Any]) -> str:
    lines = [
        f"chosen on: {choice['protocol']}; commit {choice['versions']['commit']}",
        "Loss of perplexity by int8 (a step for each row), by channels and factor",
        f"{'channels':34}" + "".join(f"{factor:>9g}" for factor in FACTORS),
    ]
    for start in range(0, len(choice["grid"]), len(FACTORS)):
        part = choice["grid"][start : start + len(FACTORS)]
        names = ", ".join(map(str, part[0]["channels"]))
        lines.append(f"{names:34}" + "".join(f"{one['loss']:9.2%}" for one in part))
    chosen = choice["chosen"]
    lines.append(
        f"chosen: {chosen['channels']}, factor {chosen['factor']:g}, the first with more than {CHOSEN_LOSS:.0%}"
    )
    return "\n".join(lines)


def tables(whole: dict[str, Any]) -> str:
    lines = [f"judged on: {whole['judged_on']}; commit {whole['versions']['commit']}"]
    for verdict in whole["verdicts"]:
        first = verdict["rows"][0]
        share, exact = verdict["in_sixteen_bits"], verdict["exact"]
        lines += [
            "",
            f"{verdict['model']}: perplexity {first['perplexity']:.4f}; columns that reach 6 in a window: "
            f"{share['mean']:.1%} on average over layers, {share['largest']:.1%} at most; systematic channels: "
            f"{', '.join(map(str, verdict['systematic_channels'])) or 'none'}; kept by calibration in 16 bits: "
            f"{exact['mean']:.1%} of the weights' columns, {exact['largest']:.1%} at most",
            f"{'':42}{'perplexity':>12}{'loss':>10}{'mean KL, 1e-3':>18}{'same top-1':>12}",
        ]
        for one in verdict["rows"]:
            lines.append(
                f"{one['name']:42}{one['perplexity']:12.3f}{one['loss']:10.3%}"
                f"{1e3 * one['mean_kl']:10.3f} ± {1e3 * one['mean_kl_error']:5.3f}{one['top1']:12.2%}"
            )
    return "\n".join(lines)


def bars(verdicts: list[dict[str, Any]]) -> str:
    rows = {(verdict["model"], one["name"]): one["loss"] for verdict in verdicts for one in verdict["rows"]}
    lines = []
    for model in [verdict["model"] for verdict in verdicts if verdict["model"] != "demo"]:
        for name in ("int8, in float32", "W8A8"):
            loss = rows[model, name]
            said = "above" if loss > BARS["naive"] else "NOT above"
            lines.append(f"{model}: {name} loses {loss:.2%}, {said} {BARS['naive']:.0%}")
        loss = rows[model, EXACT]
        said = "below" if loss < BARS["exact"] else "NOT below"
        without = rows[model, "LLM.int8() without exact outliers"]
        said += f" {BARS['exact']:.1%}; without {without:.3%}"
        lines.append(f"{model}: LLM.int8() with exact outliers loses {loss:.3%}, {said}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="a JSON file, in which one part keeps what the other wrote; the tables go beside it as .txt",
    )
    parser.add_argument("--choose", action="store_true", help="choose channels and factor, and judge nothing")
    parser.add_argument(
        "--judge", action="store_true", help="judge what the demo's script has, and choose nothing"
    )
    options = parser.parse_args()
    hf.require_transformers().utils.logging.disable_progress_bar()
    demo = script()
    base, tokenizer = (
        hf.load_causal_lm(demo.MODEL, dtype=torch.float32),
        hf.load_tokenizer(demo.MODEL),
    )
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    half = len(text) // 2

    def windows_of(part: str, tokens: int) -> Windows:
        return cut(part, tokenizer, context=512, dtype=torch.float32, max_tokens=tokens)

    whole = earlier(options.out)
    if not options.choose:
        whole["verdicts"] = []
    if not options.judge:
        whole["choice"] = choose(demo, base, windows_of(text[half:], TOKENS["chosen"]))
        write(options.out, whole)
    if options.choose:
        print(grid(whole["choice"]))
        return
    judged = windows_of(text[:half], TOKENS["judged"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        calibration = work / "calibration.txt"
        calibration.write_text(text[half:], encoding="utf-8")
        sources = {
            "outliers": demo.write(work / "outliers"),
            "outliers, quiet": demo.write(work / "quiet", silent=True),
            "demo": demo.MODEL,
        }
        whole.update(
            machine=machine(), versions=versions(), judged_on=str(judged.protocol), calibration=CALIBRATION
        )
        for name, source in sources.items():
            whole["verdicts"].append({**judge(work, source, calibration, base, judged), "model": name})
            write(options.out, whole)
    print(said(whole))


def earlier(out: Path | None) -> dict[str, Any]:
    """What an earlier run has written there: choosing alone keeps the verdicts, judging alone the choice."""
    if out is not None and out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    return {"choice": None, "verdicts": []}


def said(whole: dict[str, Any]) -> str:
    parts = [] if whole["choice"] is None else [grid(whole["choice"])]
    if whole["verdicts"]:
        parts += [tables(whole), bars(whole["verdicts"])]
    return "\n\n".join(parts)


def write(out: Path | None, whole: dict[str, Any]) -> None:
    """What there is so far: judging a model takes minutes."""
    if out is None:
        return
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".txt").write_text(said(whole) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
