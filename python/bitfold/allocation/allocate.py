"""A budget becomes a recipe: measure or read, choose, measure the choice, look again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitfold import budget, hf, layout, memory
from bitfold.allocation import rounds as looking
from bitfold.allocation.choose import Allocation, Limit, allowed_of, cache_options, choose, limit_of
from bitfold.allocation.recipe import to_recipe
from bitfold.allocation.rounds import Round
from bitfold.allocation.solver import require_scipy
from bitfold.calibration import overlap
from bitfold.calibration.workers import Workers
from bitfold.evaluate import Estimate
from bitfold.kv.blocks import DEFAULT_GROUP, FORMATS
from bitfold.kv.store import PAGE
from bitfold.layout import Source
from bitfold.outfile import check_output
from bitfold.pipeline import Origin
from bitfold.rules import KEEP, Recipe
from bitfold.sensitivity import ground as grounds
from bitfold.sensitivity import result
from bitfold.sensitivity.candidates import parts_of, read
from bitfold.sensitivity.ground import Texts
from bitfold.sensitivity.measure import Job, Progress, asked_of, choices
from bitfold.sensitivity.result import Sensitivity
from bitfold.sensitivity.walk import Ground
from bitfold.shards import CheckpointError


@dataclass(frozen=True)
class Target:
    """A budget: exactly one of bits per weight that takes part, and bytes of all tensors of the checkpoint.

    context: tokens of a KV cache whose bytes count too, and whose format is chosen along; None: it doesn't count;
    batch: sequences in it.
    """

    bits: float | None = None
    nbytes: int | None = None
    context: int | None = None
    batch: int = 1


@dataclass(frozen=True)
class Outcome:
    """What was chosen. rounds: with what was measured of each; empty where there was no text to measure on."""

    recipe: Recipe
    allocation: Allocation
    rounds: tuple[Round, ...]
    found: Sensitivity
    seen: dict[str, object]
    target: Target = Target()

    @property
    def measured(self) -> Estimate | None:
        """KL of the whole model on the text that it was chosen by, in nats a token."""
        return looking.best(self.rounds).measured if self.rounds else None

    @property
    def needs_calibration(self) -> bool:
        return self.recipe.needs_calibration

    @property
    def origin(self) -> Origin:
        return Origin(self.described(), self.seen)

    def described(self) -> dict[str, object]:
        """What the checkpoint's report says of the choice."""
        return {
            "target": self.allocation.limit.asked,
            "bytes_at_most": self.allocation.limit.nbytes,
            "bytes": self.allocation.nbytes,
            **({"kv_cache": self._cache()} if self.allocation.cache else {}),
            "predicted_kl": dataclasses.asdict(self.allocation.predicted),
            "measured_kl": dataclasses.asdict(self.measured) if self.measured else None,
            "rounds": [
                {
                    "number": one.number,
                    "changed": one.changed,
                    "bytes": one.allocation.nbytes,
                    **({"kv_cache": one.allocation.cache} if one.allocation.cache else {}),
                    "predicted_kl": dataclasses.asdict(one.predicted),
                    "measured_kl": dataclasses.asdict(one.measured),
                }
                for one in self.rounds
            ],
            "protocol": str(self.found.protocol),
            "candidates": dict(self.allocation.candidates),
        }

    def _cache(self) -> dict[str, object]:
        """format: the model's own dtype, or what bitfold.QuantizedCache is to be given."""
        entry = self.found.caches.find(self.allocation.cache) if self.found.caches else None
        kl = Estimate(0.0, 0.0) if entry is None else entry.kl(self.found.window_tokens)
        return {
            "format": self.allocation.cache,
            "quantized": self.allocation.packed_cache is not None,
            "context": self.target.context,
            "batch": self.target.batch,
            "bytes": self.allocation.cache_nbytes,
            "bytes_by_format": dict(self.allocation.limit.caches),
            "kl_alone": dataclasses.asdict(kl),
        }


def allocate(
    model: str | Path,
    target: Target,
    texts: Texts,
    *,
    sensitivity: str | Path | Sensitivity | None = None,
    candidates: Sequence[str] = (),
    include: Sequence[str] = (),
    rounds: int = 1,
    name: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    told: Callable[[Round], None] = lambda round: None,
    progress: Progress | None = None,
) -> Outcome:
    """The recipe with the smallest loss for so many bytes.

    Args:
        model: a Hugging Face model directory, unquantized.
        target: the budget.
        texts: to measure on, and to calibrate on. Without a text the choice is made by `sensitivity` alone, and neither
            measured nor looked at again.
        sensitivity: measurements of this model, or the file. None, or a file that isn't there or isn't finished: they
            are made on the text, and written there as they come.
        candidates: formats that may be chosen; none: all that were measured, or the default ones. Calibrated ones only
            where there is a text to calibrate on. Every weight may also be kept.
        include: patterns that spell the names of embeddings or the head that are to take part.
        rounds: how often to measure anew around a choice (rounds.py), at most.
        name: of the recipe; "": one that says the budget.
        told: of each choice when it has been measured.
        progress: told as work goes on.

    Raises ValueError where there is neither text nor measurements, a budget can't be met or leaves nothing to choose, a
    candidate wasn't measured; CheckpointError where measurements are of another model or another calibration text;
    MissingExtraError where scipy or transformers is not installed.
    """
    require_scipy()
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}, it must be at least 0")
    if not texts.text and sensitivity is None:
        raise ValueError(
            "there is nothing to choose by: give a text (--text FILE), or measurements (--sensitivity FILE)"
        )
    asked = asked_of(candidates, texts)
    source = layout.read_source(Path(model))
    caches_of(source, target)  # what can't be is said before anything is measured
    output = None
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        output = Path(sensitivity)
        if texts.text and not (output.exists() and result.read(output).finished):
            check_output("sensitivity", output, result.FILE)
            sensitivity = None
        else:
            sensitivity = result.read(output)
    if sensitivity is not None:
        sensitivity = _of_this_model(source, sensitivity, texts, include)
        _limits(source, sensitivity, target, _allowed(sensitivity, texts, [str(one) for one in asked]))
    with contextlib.ExitStack() as stack:
        ground = None
        if texts.text:
            prepared = grounds.prepare(model, texts, include, dtype=dtype, device=device)
            ground = stack.enter_context(prepared)
        if sensitivity is None:
            assert ground is not None
            wants_caches = target.context is not None
            job = Job(ground, choices(ground, asked), False, output, progress, want_caches=wants_caches)
            if output is not None and output.exists():
                job.resume(result.read(output))
            sensitivity = job.run()
        allowed = _allowed(sensitivity, texts, [str(one) for one in asked])
        limit = _limits(source, sensitivity, target, allowed)
        allocation = choose(sensitivity, limit, allowed)
        tried = _look(ground, sensitivity, allocation, allowed, rounds, told, progress)
    if tried:
        allocation = looking.best(tried).allocation
    recipe = _recipe(source, sensitivity, allocation, name)
    _check_bytes(source, recipe, allocation)
    return Outcome(recipe, allocation, tried, sensitivity, _seen(sensitivity, ground), target)


def caches_of(source: Source, target: Target) -> dict[str, int]:
    """Bytes of the KV cache by its format, the model's own dtype first; empty where it doesn't count.

    Those of a bitfold.QuantizedCache are the most that it has on any way to the context. Only layers with a window can
    have more than after a prompt: while tokens come one by one, tokens that left the window stay until their page is
    all of such.

    Raises ValueError for a context or a batch that can't be, a target that it has no part in, and a model whose cache
    isn't one of keys and values.
    """
    if target.context is None:
        if target.batch != 1:
            raise ValueError(f"batch is {target.batch}, which is for a context: give that too")
        return {}
    if target.bits is not None:
        raise ValueError(
            f"context is {target.context}, and the target is in bits per weight, which a KV cache has no part in: it "
            "must be a size"
        )
    longest = hf.longest_context(source.model_config)
    if longest is not None and target.context > longest:
        raise ValueError(
            f"context is {target.context}, it must be at most {longest}, the positions that the model has"
        )
    own = memory.run_of(source, target.context, target.batch)
    try:
        shape = hf.cache_shape(source.model_config)
    except ValueError as error:
        raise ValueError(
            f"context is {target.context}, but the model has no KV cache that can be counted: {error}"
        ) from None
    nbytes = memory.kv_cache(source, own)
    assert nbytes is not None
    left = PAGE * DEFAULT_GROUP - 1
    wider = dataclasses.replace(shape, windows=tuple(w and w + left for w in shape.windows))
    found = {own.kv_format: nbytes}
    for format in FORMATS:
        run = dataclasses.replace(own, kv_format=format)
        found[format] = target.batch * shape.heads * memory.quantized_cache(wider, run)
    return found


def _of_this_model(source: Source, found: Sensitivity, texts: Texts, include: Sequence[str]) -> Sensitivity:
    """The measurements that are meant, once they are known to be of this model."""
    with Workers() as workers:
        if found.of.get("model") != grounds.model_sha256(source, workers):
            raise CheckpointError(
                f"the measurements are of another model than {source.path}: measure this one"
            )
    if not found.finished:
        raise CheckpointError("the measurements are unfinished: give the command that made them again")
    if texts.calibration and found.of.get("calibration text") != "none":
        rows = grounds.calibration_of(source, hf.load_tokenizer(source.path), texts)
        assert rows is not None
        if rows.sha256 != found.of.get("calibration text"):
            raise CheckpointError(
                "the measurements were made with another calibration text, or other samples of it: give the same"
            )
    return result.restrict(found, [part.name for part in parts_of(source, include)])


def _allowed(found: Sensitivity, texts: Texts, asked: Sequence[str]) -> tuple[str, ...]:
    """The candidates that may be chosen."""
    allowed = allowed_of(found, asked)
    if texts.calibration:
        return allowed
    plain = tuple(name for name in allowed if not read(name).needs_calibration)
    if not plain:
        raise ValueError(
            f"all candidates need a text to calibrate on ({', '.join(allowed)}): give --calibration FILE"
        )
    return plain


def _limits(source: Source, found: Sensitivity, target: Target, allowed: Sequence[str]) -> Limit:
    caches = caches_of(source, target)
    limit = limit_of(source, found, allowed, bits=target.bits, nbytes=target.nbytes, caches=caches)
    cache_options(found, limit)  # raises where the cache wasn't measured
    return limit


def _look(
    ground: Ground | None,
    found: Sensitivity,
    allocation: Allocation,
    allowed: Sequence[str],
    count: int,
    told: Callable[[Round], None],
    progress: Progress | None,
) -> tuple[Round, ...]:
    if ground is None:
        return ()
    return looking.run(ground, found, allocation, allowed, count, told=told, progress=progress)


def _recipe(source: Source, found: Sensitivity, allocation: Allocation, name: str) -> Recipe:
    by_module = {
        module: read(candidate)
        for part, candidate in allocation.candidates.items()
        for module in found.modules[part]["names"]
    }
    count = len(set(allocation.candidates.values()) - {KEEP})
    asked = allocation.limit.asked
    description = f"{count} formats for at most {asked}, chosen by what each weight loses alone on a text"
    recipe = to_recipe(name or f"for {asked}", description, by_module, source.infos)
    return dataclasses.replace(recipe, kv_cache=allocation.packed_cache or "")


def _check_bytes(source: Source, recipe: Recipe, allocation: Allocation) -> None:
    """What the checkpoint will hold is what was counted, and within the budget."""
    planned = budget.budget(source, recipe, memory.run_of(source)).nbytes
    if planned != allocation.nbytes or allocation.total > allocation.limit.nbytes:
        raise RuntimeError(
            f"the recipe takes {planned:,} bytes; {allocation.nbytes:,} were counted, {allocation.total:,} in all of "
            f"at most {allocation.limit.nbytes:,}: this is a bug"
        )


def _seen(found: Sensitivity, ground: Ground | None) -> dict[str, object]:
    """The passages of both texts, that of the measurements and that of the rounds."""
    if ground is None:
        return dict(found.seen)
    here = Path(overlap.FILE)
    both = [overlap.from_json(one, here) for one in (found.seen, grounds.seen(ground))]
    return overlap.to_json(np.union1d(*both))
