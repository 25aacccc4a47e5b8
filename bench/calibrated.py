"""Compares what calibrating is worth on the demo model: rounding, GPTQ and AWQ, and llm-compressor's GPTQ and AWQ.

    python bench/calibrated.py --peer PYTHON --out bench/results/calibrated-NAME.json

PYTHON is the interpreter of an environment that has llmcompressor, and a transformers that reads the demo model;
without it bitfold is measured alone. Every method is given the same rows of tokens, drawn from the second half of
heldout.txt, and every result is compared with the 16-bit model on the first half. Formats are symmetric integers; each
library chooses its own scales. Options are each library's own, but for the damping (0.01) and the order of the columns
(by falling diagonal, scales fixed before), which are the same. "gptq, plain" has the scales of plain rounding; the bars
are for what is done where nothing is asked for.

What was measured before stays in the file where it isn't measured again, so that it can be done in steps (--formats,
--methods); each row has its own commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold import hf
from bitfold.bench.machine import versions
from bitfold.calibration import data
from bitfold.evaluate import Comparison, compare_all, cut, default_context, kl_gap
from bitfold.quantizers.awq import AwqOptions
from bitfold.quantizers.gptq import GptqOptions
from bitfold.recipes import Recipe, Rule
from peer import save
from torch import nn

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
FORMATS = ("int4-g128", "int4-g64", "int3-g128", "int3-g64")
METHODS = {"gptq": GptqOptions(), "gptq, plain": GptqOptions(search=False), "awq": AwqOptions()}
SAMPLES, LENGTH, TOKENS = 64, 512, 8192  # of calibration, and of the text that is measured on
ERRORS_BAR = 3.0  # standard errors below plain rounding
PEER_BAR = 1.03  # times the peer's divergence

# llm-compressor's side: leaves the weights that it has rounded, as floats.
PEER = """
import json, sys, torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

torch.Tensor.pin_memory = lambda tensor, *_: tensor  # its AWQ pins memory for a GPU that is not there
asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])
ids = torch.load(asked["ids"])
rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
weights = {"num_bits": asked["bits"], "type": "int", "symmetric": True}
weights |= {"strategy": "group", "group_size": asked["group"]}
common = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
if asked["method"] == "gptq":
    modifier = GPTQModifier(**common, dampening_frac=0.01, actorder="static")
else:
    modifier = AWQModifier(**common)
oneshot(
    model=model, dataset=rows, recipe=[modifier], max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
    shuffle_calibration_samples=False,
)
with torch.no_grad():  # AWQ leaves weights scaled, to be rounded when they are stored
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            zero = getattr(module, "weight_zero_point", None)
            module.weight.copy_(fake_quantize(module.weight, module.weight_scale, zero, scheme.weights))
torch.save(model.state_dict(), asked["weights"])
"""


def peer(python: str, format: str, method: str, ids: Path, folder: Path, threads: int) -> nn.Module:
    """The demo model with the weights that llm-compressor makes of it."""
    parsed = bitfold.formats.parse(format)
    weights = folder / "weights.pt"
    asked = {
        "model": str(DEMO / "model"),
        "ids": str(ids),
        "weights": str(weights),
        "bits": parsed.bits,
        "group": parsed.group,
        "method": method,
        "threads": threads,
    }
    done = subprocess.run(
        [python, "-W", "ignore", "-c", PEER, json.dumps(asked)], capture_output=True, text=True, cwd=folder
    )
    if done.returncode != 0:
        raise SystemExit(f"llm-compressor's {method} of {format} failed:\n{done.stderr[-3000:]}")
    model = hf.load_causal_lm(DEMO / "model", dtype=torch.float32)
    state = torch.load(weights)
    names = set(model.state_dict())
    changed = [
        name
        for name, old in model.state_dict().items()
        if name.endswith("_proj.weight") and not torch.equal(old, state[name])
    ]
    if len(changed) != sum(name.endswith("_proj.weight") for name in names):
        raise SystemExit(
            f"llm-compressor's {method} of {format} left weights as they were: it rounded {changed}"
        )
    model.load_state_dict({name: value for name, value in state.items() if name in names})
    return model


def measure(formats: list[str], methods: list[str], python: str | None, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    source, text = DEMO / "model", (DEMO / "heldout.txt").read_text(encoding="utf-8")
    tokenizer, base = hf.load_tokenizer(source), hf.load_causal_lm(source, dtype=torch.float32)
    windows = cut(text, tokenizer, context=default_context(base), dtype=torch.float32, max_tokens=TOKENS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration, ids = folder / "text.txt", folder / "ids.pt"
        calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
        torch.save(data.read(calibration, tokenizer, samples=SAMPLES, sequence_length=LENGTH).ids, ids)
        for format in formats:
            models: dict[str, nn.Module] = {}
            bitfold.quantize_checkpoint(source, folder / "q", format, force=True)
            models["rounding"] = bitfold.load(folder / "q", dtype=torch.float32)
            for method in methods:
                kind, target = method.partition(",")[0], folder / f"{method}-{format}"
                recipe = Recipe(method, "", (Rule("*", format, kind, METHODS[method]),))
                bitfold.quantize_calibrated(
                    source, target, recipe, calibration, samples=SAMPLES, sequence_length=LENGTH
                )
                models[method] = bitfold.load(target, dtype=torch.float32)
                if python and method == kind:
                    models[f"{kind}, peer"] = peer(python, format, kind, ids, folder, threads)
            rows += compare(format, compare_all(base, models, windows))
            print(table(rows[-len(models) :]), file=sys.stderr)
    return {"protocol": str(windows.protocol), "samples": SAMPLES, "length": LENGTH, "rows": rows}


def compare(format: str, found: dict[str, Comparison]) -> list[dict[str, Any]]:
    """A row for each model of a format; of bitfold's also how far it is from rounding and from the peer."""
    rows, commit = [], versions()["commit"]
    for name, comparison in found.items():
        kl = comparison.mean_kl
        row: dict[str, Any] = {"format": format, "method": name, "kl": kl.value, "kl_error": kl.error}
        row["commit"] = commit
        if name in METHODS:
            gap = kl_gap(comparison, found["rounding"])
            assert gap.error is not None
            row["errors_below_rounding"] = gap.value / gap.error
            other = found.get(f"{name.partition(',')[0]}, peer")
            if other is not None:
                theirs = kl_gap(comparison, other)
                row["over_peer"] = kl.value / other.mean_kl.value
                row["gap_to_peer"], row["gap_to_peer_error"] = theirs.value, theirs.error
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'format':12}{'method':14}{'KL, thousandths':>18}{'below rounding':>18}{'over the peer':>16}"
        f"{'peer - bitfold':>20}"
    ]
    for row in rows:
        line = f"{row['format']:12}{row['method']:14}{1e3 * row['kl']:10.3f} ± {1e3 * row['kl_error']:5.3f}"
        if "errors_below_rounding" in row:
            line += f"{row['errors_below_rounding']:14.1f} SE"
        if "over_peer" in row:
            line += f"{row['over_peer']:16.3f}{1e3 * row['gap_to_peer']:12.3f} ± {1e3 * row['gap_to_peer_error']:5.3f}"
        lines.append(line)
    return "\n".join(lines)


def bars(rows: list[dict[str, Any]]) -> str:
    lines = []
    for what, key, wanted, worst in (
        ("standard errors below plain rounding", "errors_below_rounding", ERRORS_BAR, min),
        ("divergence over the peer's", "over_peer", PEER_BAR, max),
    ):
        found = [row[key] for row in rows if key in row and "," not in row["method"]]
        if found:
            value = worst(found)
            met = value >= wanted if worst is min else value <= wanted
            lines.append(f"{what}: {value:.3f} at worst, wanted {wanted}, met: {met}")
    return "\n".join(lines)


def merge(report: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The report with the rows of one before it that weren't measured again."""
    for key in ("protocol", "samples", "length"):
        if report[key] != before[key]:
            raise SystemExit(f"the file has {key} {before[key]}, this run {report[key]}: name another file")
    rows = {(row["format"], row["method"]): row for row in [*before["rows"], *report["rows"]]}
    order = ["rounding", *(name + peer for name in METHODS for peer in ("", ", peer"))]
    formats = list(dict.fromkeys([*FORMATS, *(format for format, _ in rows)]))
    places = sorted(rows, key=lambda at: (formats.index(at[0]), order.index(at[1])))
    return report | {"rows": [rows[place] for place in places]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", help="a Python that has llmcompressor")
    parser.add_argument("--out", type=Path, help="a JSON file; the table goes beside it as .txt")
    options = parser.parse_args()
    report = measure(options.formats, options.methods, options.peer, options.threads)
    if options.out and options.out.exists():
        report = merge(report, json.loads(options.out.read_text())["calibrated"])
    text = table(report["rows"]) + "\n\n" + bars(report["rows"])
    save(options.out, "calibrated", report, text, options.threads)


if __name__ == "__main__":
    sys.exit(main())
