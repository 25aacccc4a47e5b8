"""Formats of the weights and of the KV cache chosen together for a budget, against uniform weights beside every format
of the cache, at equal bytes, on the demo model.

    python bench/allocation_cache.py --work DIR --out bench/results/allocation-cache-demo.json

Bytes are those of all tensors of the checkpoint and of the cache of BATCH sequences at the model's longest context, as
`bitfold quantize --target-size --context --batch` counts them. Everything is plain rounding, embeddings are kept, and
the text has the parts of bench/allocation.py. Each contestant is a whole checkpoint, loaded as a user does it and run
by way of its cache, 8 tokens at a time; its KL is from the unquantized model by way of a cache in its own dtype. A
budget is the bytes of one contestant, and a choice is compared with the best contestant that is no larger: windows
paired, with the standard error of the difference. DIR keeps what has been measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitfold
import torch
from allocation import MODEL, Bench, open_bench
from bitfold import hf, hub, layout
from bitfold.allocation.allocate import Target, allocate, caches_of
from bitfold.bench.machine import machine, versions
from bitfold.evaluate import Windows, divergence, log_probs, ratio
from bitfold.kv.blocks import FORMATS
from bitfold.kv.through import Through
from bitfold.recipes import get
from bitfold.rules import Assignment
from bitfold.sensitivity.measure import measure
from torch import Tensor

BATCH = 8
JUDGED = 4088  # tokens
CANDIDATES = ("q4_k", "q6_k", "int8")
# The contestants whose bytes are budgets: weights, and the cache ("": in the model's own dtype).
BUDGETS = (("q4_k", "int4"), ("q4_k", "int8"), ("q6_k", "int8"), ("q6_k", ""))


@torch.no_grad()
def logits_of(model: Any, windows: Windows, cache: str) -> list[Tensor]:
    """Of the scored positions of each window, by way of a cache."""
    through = Through(model, cache or None)
    return [
        through(ids[None]).logits[0, -scored - 1 : -1].clone()
        for ids, scored in zip(windows.ids, windows.scored, strict=True)
    ]


class Contest:
    """rows: what has been measured, by weights and cache; sizes: bytes of the cache by format, "" the model's own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.place = bench.work / "cache-rows.json"
        known = json.loads(self.place.read_text(encoding="utf-8")) if self.place.exists() else {}
        self.rows: dict[str, dict[str, Any]] = known
        source = layout.read_source(MODEL)
        context = hf.longest_context(source.model_config)
        self.target = Target(nbytes=1, context=context, batch=BATCH)
        sizes = caches_of(source, self.target)
        self.own = next(iter(sizes))
        self.sizes = {"": sizes[self.own], **{name: sizes[name] for name in FORMATS}}
        self.base = logits_of(bench.base, bench.judged, "")

    def add(self, name: str, model: Any, nbytes: int, cache: str, **noted: Any) -> dict[str, Any]:
        """nbytes: of the checkpoint."""
        found = logits_of(model, self.bench.judged, cache)
        pairs = zip(self.base, found, strict=True)
        sums = [float(divergence(log_probs(ours), log_probs(theirs)).sum()) for ours, theirs in pairs]
        kl = ratio(sums, self.bench.judged.scored)
        row = {"name": name, "cache": cache or self.own, "bytes": nbytes + self.sizes[cache], **noted}
        self.rows[name] = {**row, "kl": kl.value, "kl_error": kl.error, "window_kl": sums}
        self.place.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        print(f"{name:40}{row['bytes']:>12,}{1e3 * kl.value:10.3f} thousandths", file=sys.stderr)
        return self.rows[name]

    def uniform(self) -> None:
        for weights in ("keep", *CANDIDATES):
            wanted = [cache for cache in self.sizes if _name(weights, cache or self.own) not in self.rows]
            if not wanted:
                continue
            if weights == "keep":
                model, nbytes = self.bench.base, kept_bytes()
            else:
                place = self.bench.work / "made"
                nbytes = bitfold.quantize_checkpoint(MODEL, place, get(weights), force=True).bytes_after
                model = hub.load(place, dtype=torch.float32)
            for cache in wanted:
                self.add(_name(weights, cache or self.own), model, nbytes, cache, kind="uniform")

    def choices(self) -> None:
        texts = self.bench.texts(calibrated=False)
        found = measure(
            MODEL,
            texts,
            CANDIDATES,
            additivity=False,
            caches=True,
            output=self.bench.work / "cache-sensitivity.json",
        )
        for weights, cache in BUDGETS:
            like = _name(weights, cache or self.own)
            name = f"chosen for {like}"
            if name in self.rows:
                continue
            limit = self.rows[like]["bytes"]
            target = Target(nbytes=limit, context=self.target.context, batch=BATCH)
            outcome = allocate(MODEL, target, texts, sensitivity=found, rounds=0)
            place = self.bench.work / "made"
            done = bitfold.quantize_checkpoint(MODEL, place, outcome.recipe, force=True)
            chosen = outcome.allocation.packed_cache or ""
            row = self.add(
                name,
                hub.load(place, dtype=torch.float32),
                done.bytes_after,
                chosen,
                kind="chosen",
                at_most=limit,
                choice=outcome.described(),
            )
            assert row["bytes"] <= limit, name


def _name(weights: str, cache: str) -> str:
    return f"{weights}, cache {cache}"


def kept_bytes() -> int:
    """Of all tensors of the model as it is."""
    source = layout.read_source(MODEL)
    kept = {name: Assignment(None, None, "") for name in source.infos}
    return sum(step.nbytes for step in layout.steps(source, kept, compare_tied=False))


def nearest(rows: dict[str, dict[str, Any]], row: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """The best of the contestants that are no larger than the budget."""
    others = [one for one in rows.values() if one["kind"] == "uniform" and one["bytes"] <= row["at_most"]]
    best = min(others, key=lambda one: one["kl"])
    gap = ratio([b - a for a, b in zip(row["window_kl"], best["window_kl"], strict=True)], counts)
    assert gap.error is not None
    return {
        "name": best["name"],
        "of": len(others),
        "bytes": best["bytes"],
        "kl": best["kl"],
        "kl_ratio": best["kl"] / row["kl"],
        "errors": gap.value / gap.error if gap.error else 0.0,
    }


def report(contest: Contest) -> tuple[str, list[dict[str, Any]]]:
    rows = contest.rows
    chosen = [row for row in rows.values() if row["kind"] == "chosen"]
    lines = [
        f"judged on: {contest.bench.judged.protocol}\nchosen by: {chosen[0]['choice']['protocol']}",
        f"bytes of the checkpoint and of the KV cache of {BATCH} sequences of {contest.target.context} tokens, which "
        "takes "
        + ", ".join(f"{contest.sizes[cache]:,} in {cache or contest.own}" for cache in contest.sizes),
        "KL in thousandths of a nat a token\n",
        f"{'at the bytes of':28}{'bytes':>11}{'cache':>8}{'predicted':>11}{'measured':>10}{'judged':>17}   "
        "the best uniform choice of at most these bytes, its KL, over the choice's, the difference in standard errors",
    ]  # fmt: skip
    found = []
    for row in chosen:
        best = nearest(rows, row, contest.bench.judged.scored)
        choice = row["choice"]
        lines.append(
            f"{row['name'].removeprefix('chosen for '):28}{row['bytes']:>11,}{row['cache']:>8}"
            f"{1e3 * choice['predicted_kl']['value']:11.3f}{1e3 * choice['measured_kl']['value']:10.3f}"
            f"{1e3 * row['kl']:9.3f} ± {1e3 * row['kl_error']:5.3f}"
            f"   {best['name']:28}{1e3 * best['kl']:8.3f}{best['kl_ratio']:7.2f}x{best['errors']:7.1f} SE"
            f"  (of {best['of']})"
        )
        found.append({"name": row["name"], **best})
    lines += [
        "",
        f"{'uniform weights':22}" + "".join(f"{cache or contest.own:>24}" for cache in contest.sizes),
    ]
    for weights in ("keep", *CANDIDATES):
        each = [rows[_name(weights, cache or contest.own)] for cache in contest.sizes]
        lines.append(
            f"{weights:22}" + "".join(f"{one['bytes']:>14,}{1e3 * one['kl']:>10.3f}" for one in each)
        )
    return "\n".join(lines), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder for what has been measured")
    parser.add_argument("--out", type=Path, help="a JSON file; the table goes beside it as .txt")
    options = parser.parse_args()
    hf.require_transformers().utils.logging.disable_progress_bar()
    contest = Contest(open_bench(options.work, JUDGED))
    contest.uniform()
    contest.choices()
    text, found = report(contest)
    print(text)
    if options.out:
        rows = [{k: v for k, v in row.items() if k != "window_kl"} for row in contest.rows.values()]
        whole = {
            "machine": machine(),
            "versions": versions(),
            "judged_on": str(contest.bench.judged.protocol),
            "batch": BATCH,
            "context": contest.target.context,
            "cache_bytes": {cache or contest.own: nbytes for cache, nbytes in contest.sizes.items()},
            "rows": rows,
            "contests": found,
        }
        options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
