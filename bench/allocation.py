"""Formats chosen for a budget against uniform presets and llama.cpp's mixes, at equal bytes, on the demo model.

    python bench/allocation.py --work DIR --out bench/results/allocation-demo.json

Three parts of heldout.txt that share nothing: what is measured by (sensitivities, and the rounds), what is calibrated
on, and what the result is judged on. Each contestant is a whole checkpoint or file, quantized and loaded as a user does
it; its bytes are those of all its tensors. Four kinds of contest, each with the same means for all:

    plain                nothing but the weights is looked at; embeddings are kept (the presets)
    plain, embedding     the embedding takes part too (the mixes quantize it)
    calibrated           GPTQ and AWQ on the calibration text; embeddings are kept
    calibrated, embedding  the embedding takes part; mixes with importance of the calibration text, and without

For each budget, the bytes of a contestant, all contestants of its kind and of the kinds that have less means are
compared that are no larger: the difference of mean KL over the windows of the text, paired, with its standard error.
DIR keeps what has been measured, so that the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold import budget, hf, hub, layout, memory
from bitfold.allocation.allocate import Target, allocate
from bitfold.bench.machine import machine, versions
from bitfold.evaluate import Windows, cut, default_context, divergence, log_probs, ratio
from bitfold.gguf.imatrix_file import read_importance, write_imatrix
from bitfold.gguf.mixes import MIXES
from bitfold.gguf.quantize import plan_gguf, quantize_gguf
from bitfold.imatrix import chunks_of
from bitfold.imatrix import measure as measure_importance
from bitfold.recipes import RECIPES, Recipe, get
from bitfold.sensitivity.ground import Texts
from bitfold.sensitivity.measure import measure
from bitfold.sensitivity.result import Sensitivity, read
from torch import Tensor

MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo" / "model"
TEXT = MODEL.parent / "heldout.txt"
JUDGED, CHOSEN = 0.3, 0.5  # the text is cut there: judged on, chosen by, calibrated on
TOKENS = {"judged": 8176, "chosen": 4088}
CALIBRATION = {"samples": 64, "sequence_length": 512}
EMBEDDING = "*.embed_tokens"
PLAIN = ("q2_k", "int3-g128", "q3_k", "nf4-b64-dq", "iq4_xs", "q4_k", "q5_k", "q6_k")
CALIBRATED = tuple(f"gptq-{name}" for name in PLAIN)
CANDIDATES = (*CALIBRATED, "int8", *PLAIN)
BAR = 3.0  # standard errors

# Kind of contest: budgets by the contestant whose bytes they are.
BUDGETS = {
    "plain": ("int3-g64", "nf4-dq", "nf4", "int4-mixed", "int8"),
    "plain, embedding": ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q6_K"),
    "calibrated": ("gptq-int3-g64", "gptq-int4-g128"),
    "calibrated, embedding": ("Q3_K_M", "Q4_K_M"),
}
INCLUDES = {
    "plain": ("plain",),
    "plain, embedding": ("plain", "plain, embedding"),
    "calibrated": ("plain", "calibrated"),
    "calibrated, embedding": ("plain", "plain, embedding", "calibrated", "calibrated, embedding"),
}


@dataclass(frozen=True)
class Bench:
    """Texts as files in the work folder, the windows to judge on, the base model and its logits on them, and what has
    been measured (`rows`, by name)."""

    work: Path
    judged: Windows
    base: Any
    logits: list[Tensor]
    rows: dict[str, dict[str, Any]]

    def texts(self, calibrated: bool) -> Texts:
        text = (self.work / "chosen.txt").read_text(encoding="utf-8")
        calibration = self.work / "calibration.txt" if calibrated else ""
        return Texts(text, TOKENS["chosen"], 0, calibration, **CALIBRATION)

    def add(self, name: str, kind: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """A contestant's row: made and measured unless it is there; make: told where, returns what else to note."""
        if name not in self.rows:
            place = self.work / ("made.gguf" if name.startswith(("mix ", "importance ")) else "made")
            noted = make(place)
            found = logits_of(hub.load(place, dtype=torch.float32), self.judged)
            pairs = zip(self.logits, found, strict=True)
            sums = [float(divergence(log_probs(ours), log_probs(theirs)).sum()) for ours, theirs in pairs]
            kl = ratio(sums, self.judged.scored)
            assert kl.error is not None
            row = {"name": name, "kind": kind, **noted, "kl": kl.value, "kl_error": kl.error}
            self.rows[name] = {**row, "window_kl": sums}
            (self.work / "rows.json").write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
            print(
                f"{name:44}{row['bytes']:>10,}{1e3 * kl.value:10.3f} ± {1e3 * kl.error:.3f}", file=sys.stderr
            )
        return self.rows[name]

    def quantize(self, place: Path, recipe: Recipe) -> dict[str, Any]:
        if recipe.needs_calibration:
            text = self.work / "calibration.txt"
            done = bitfold.quantize_calibrated(MODEL, place, recipe, text, force=True, **CALIBRATION)
        else:
            done = bitfold.quantize_checkpoint(MODEL, place, recipe, force=True)
        return {"bytes": done.bytes_after}


@torch.no_grad()
def logits_of(model: Any, windows: Windows) -> list[Tensor]:
    """Of the scored positions of each window."""
    return [
        model(input_ids=ids[None], use_cache=False).logits[0, -scored - 1 : -1].clone()
        for ids, scored in zip(windows.ids, windows.scored, strict=True)
    ]


def open_bench(work: Path, judged_tokens: int = TOKENS["judged"]) -> Bench:
    work.mkdir(parents=True, exist_ok=True)
    text = TEXT.read_text(encoding="utf-8")
    first, second = int(JUDGED * len(text)), int(CHOSEN * len(text))
    (work / "chosen.txt").write_text(text[first:second], encoding="utf-8")
    (work / "calibration.txt").write_text(text[second:], encoding="utf-8")
    tokenizer, base = hf.load_tokenizer(MODEL), hf.load_causal_lm(MODEL, dtype=torch.float32)
    judged = cut(
        text[:first],
        tokenizer,
        context=default_context(base),
        dtype=torch.float32,
        max_tokens=judged_tokens,
    )
    rows = work / "rows.json"
    known = json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else {}
    return Bench(work, judged, base, logits_of(base, judged), known)


# ---- the contestants ----


def presets(bench: Bench, calibrated: bool) -> None:
    for name, recipe in RECIPES.items():
        if recipe.needs_calibration != calibrated:
            continue
        kind = "calibrated" if calibrated else "plain"
        bench.add(f"preset {name}", kind, lambda place, recipe=recipe: bench.quantize(place, recipe))


def uniform(bench: Bench, calibrated: bool) -> None:
    """All layers as each candidate: what the choice has to beat with its own means."""
    for name in CANDIDATES:
        recipe = get(name)
        if recipe.needs_calibration != calibrated:
            continue
        kind = "calibrated" if calibrated else "plain"
        bench.add(f"uniform {name}", kind, lambda place, recipe=recipe: bench.quantize(place, recipe))


def mixes(bench: Bench, calibrated: bool) -> None:
    importance = bench.work / "importance.gguf"
    if calibrated and not importance.exists():
        text = (bench.work / "calibration.txt").read_text(encoding="utf-8")
        chunks = chunks_of(text, hf.load_tokenizer(MODEL), max_chunks=CALIBRATION["samples"])
        write_imatrix(importance, measure_importance(bench.base, chunks), force=True)

    def make(place: Path, mix: str, with_importance: bool) -> dict[str, Any]:
        known = read_importance(importance) if with_importance else None
        summary = quantize_gguf(MODEL, place, mix, force=True, importance=known)
        return {"bytes": summary.plan.tensor_bytes}

    for name, mix in MIXES.items():
        if not mix.is_quantized:
            continue
        if calibrated:
            bench.add(
                f"importance {name}", "calibrated, embedding", lambda place, n=name: make(place, n, True)
            )
        elif name != "Q2_K_S":  # it asks for importance
            bench.add(f"mix {name}", "plain, embedding", lambda place, n=name: make(place, n, False))


# ---- the choices ----


def bytes_of(name: str) -> int:
    if name in RECIPES:
        source = layout.read_source(MODEL)
        return budget.budget(source, RECIPES[name], memory.run_of(source)).nbytes
    return plan_gguf(MODEL, MIXES[name]).tensor_bytes


def choices(bench: Bench, found: Sensitivity, calibrated: bool, rounds: int) -> None:
    for kind, names in BUDGETS.items():
        if ("calibrated" in kind) != calibrated:
            continue
        embedding = "embedding" in kind
        for name in names:
            limit = bytes_of(name)

            def make(place: Path, limit=limit, embedding=embedding) -> dict[str, Any]:
                outcome = allocate(
                    MODEL,
                    Target(nbytes=limit),
                    bench.texts(calibrated),
                    sensitivity=found,
                    include=[EMBEDDING] if embedding else [],
                    rounds=rounds,
                )
                noted = bench.quantize(place, outcome.recipe)
                return {**noted, "at_most": limit, "choice": outcome.described()}

            bench.add(f"chosen for {name}, {kind}", f"chosen: {kind}", make)


def contests(bench: Bench) -> list[dict[str, Any]]:
    """Each choice against all that are no larger than its budget and have no more means."""
    counts = bench.judged.scored
    found = []
    for row in bench.rows.values():
        if not row["kind"].startswith("chosen: "):
            continue
        kind = row["kind"].removeprefix("chosen: ")
        assert row["bytes"] <= row["at_most"], row["name"]
        against = []
        for other in bench.rows.values():
            if other["kind"] not in INCLUDES[kind] or other["bytes"] > row["at_most"]:
                continue
            gap = ratio([b - a for a, b in zip(row["window_kl"], other["window_kl"], strict=True)], counts)
            assert gap.error is not None
            against.append(
                {
                    "name": other["name"],
                    "bytes": other["bytes"],
                    "kl_ratio": other["kl"] / row["kl"],
                    "gap": gap.value,
                    "gap_error": gap.error,
                    "errors": gap.value / gap.error,
                }
            )
        against.sort(key=lambda one: one["kl_ratio"])
        found.append({"name": row["name"], "kind": kind, "at_most": row["at_most"], "against": against})
    return found


# ---- the report ----


def table(bench: Bench, found: list[dict[str, Any]], prefixes: tuple[str, ...]) -> str:
    """Each choice, and the nearest of its contestants."""
    lines = [
        f"{'chosen for the bytes of':34}{'bytes':>10}{'KL, thousandths':>19}{'predicted':>11}{'measured':>10}"
        f"   nearest contestant, its KL over the choice's, the difference in standard errors"
    ]
    for contest in found:
        row = bench.rows[contest["name"]]
        choice = row["choice"]
        nearest = next((o for o in contest["against"] if o["name"].startswith(prefixes)), None)
        line = (
            f"{contest['name'].removeprefix('chosen for '):34}{row['bytes']:>10,}"
            f"{1e3 * row['kl']:11.3f} ± {1e3 * row['kl_error']:5.3f}"
            f"{1e3 * choice['predicted_kl']['value']:11.3f}{1e3 * choice['measured_kl']['value']:10.3f}"
        )
        if nearest is not None:
            line += f"   {nearest['name']:34}{nearest['kl_ratio']:7.2f}x{nearest['errors']:8.1f} SE"
        lines.append(line)
    return "\n".join(lines)


def bars(found: list[dict[str, Any]], prefixes: tuple[str, ...]) -> str:
    lines = []
    for contest in found:
        against = [one for one in contest["against"] if one["name"].startswith(prefixes)]
        won = [one for one in against if one["errors"] > BAR]
        lost = ", ".join(f"{one['name']} ({one['errors']:.1f})" for one in against if one not in won)
        said = f"{contest['name']}: nearer by more than {BAR:g} standard errors than {len(won)} of {len(against)}"
        lines.append(f"{said}{f'; not: {lost}' if lost else ''}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder for what has been measured")
    parser.add_argument("--rounds", type=int, default=0, help="how often a choice is looked at again")
    parser.add_argument("--report", action="store_true", help="measure no more, say what is in DIR")
    parser.add_argument("--out", type=Path, help="a JSON file; the table goes beside it as .txt")
    options = parser.parse_args()
    hf.require_transformers().utils.logging.disable_progress_bar()
    bench = open_bench(options.work)
    measured = options.work / "sensitivity.json"
    if options.report:
        found = read(measured)
    else:
        texts = bench.texts(calibrated=True)
        found = measure(MODEL, texts, CANDIDATES, include=[EMBEDDING], output=measured)
    for calibrated in () if options.report else (False, True):
        choices(bench, found, calibrated, options.rounds)
        for contestants in (presets, mixes, uniform):
            contestants(bench, calibrated)
    contest = contests(bench)
    outer, own = ("preset ", "mix ", "importance "), ("uniform ",)
    text = "\n\n".join(
        (
            f"judged on: {bench.judged.protocol}\nchosen by: {found.protocol}",
            "All weights as one candidate: the sum of what they lose alone, and what they lose together, thousandths\n"
            + "\n".join(
                f"{one.candidate:20}{1e3 * one.added:10.3f}{1e3 * one.together.value:10.3f}{one.ratio:8.3f}x"
                for one in found.additivity
            ),
            "Against presets and mixes\n" + table(bench, contest, outer),
            bars(contest, outer),
            *(
                ["Against each candidate for all layers\n" + table(bench, contest, own), bars(contest, own)]
                if any(name.startswith(own) for name in bench.rows)
                else []
            ),
        )
    )
    print(text)
    if options.out:
        rows = [{k: v for k, v in row.items() if k != "window_kl"} for row in bench.rows.values()]
        whole = {
            "machine": machine(),
            "versions": versions(),
            "judged_on": str(bench.judged.protocol),
            "chosen_by": str(found.protocol),
            "calibration": CALIBRATION,
            "zero_control": found.zero,
            "additivity": [
                {
                    "candidate": one.candidate,
                    "added": one.added,
                    "together": one.together.value,
                    "together_error": one.together.error,
                    "ratio": one.ratio,
                }
                for one in found.additivity
            ],
            "rows": rows,
            "contests": contest,
        }
        options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
