"""What a KV cache in fewer bits loses: the unquantized model run by way of one, token after token.

A window of the text goes through the model as decoding does it (`kv.through`): every token, those of a prompt too,
attends to the past as the cache has it. It is compared with the same run on a cache in the dtype that is computed in,
so that nothing but the packing of keys and values counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bitfold.calibration.blocks import Compute
from bitfold.evaluate import divergence, log_probs
from bitfold.kv.blocks import DEFAULT_GROUP, FORMATS
from bitfold.kv.store import DEFAULT_RESIDUAL
from bitfold.kv.through import Through
from bitfold.sensitivity.result import CacheEntry, Caches
from bitfold.sensitivity.walk import Ground
from bitfold.shards import CheckpointError

SHORTEST = 2 * (DEFAULT_RESIDUAL + DEFAULT_GROUP)
"""Tokens of a window at least: in half of it some of the past is packed."""
_CHUNK = 1 << 20  # logits turned to float64 at a time


class CacheProbe:
    """The model of a ground by way of a KV cache. base: the unquantized model's logits of the scored positions of each
    window, with a cache in the dtype that is computed in; held, as those of `Probe` are.

    Raises ValueError where windows are too short for anything to be packed, or the model's layers keep something else
    than keys and values.
    """

    def __init__(self, ground: Ground) -> None:
        context = ground.windows.protocol.context
        if context < SHORTEST:
            raise ValueError(
                f"windows of the text have {context} tokens, it must be at least {SHORTEST} to measure a KV cache: "
                f"the latest {DEFAULT_RESIDUAL} to {DEFAULT_RESIDUAL + DEFAULT_GROUP} stay as they are"
            )
        self.ground = ground
        for format in FORMATS:
            Through(
                ground.probe.model, format
            ).new_cache()  # a model that has none is said before anything runs
        self.base = ground.workers.map(
            lambda window: self._logits(window, None, {}), range(len(ground.windows.ids))
        )

    def divergence(
        self, format: str | None, modules: Mapping[str, nn.Module] | None = None, **options: Any
    ) -> tuple[float, ...]:
        """Sums of KL(base || model with these modules and a cache in `format`) over each window, in nats; None: a cache
        in the dtype that is computed in. options: of bitfold.QuantizedCache."""

        def work(window: int) -> float:
            ours, theirs = self._logits(window, format, options), self.base[window]
            if not ours.isfinite().all():
                raise ValueError(f"with a KV cache in {format or 'its own dtype'}, a logit is not finite")
            size = max(1, _CHUNK // ours.shape[-1])
            pairs = zip(theirs.split(size), ours.split(size), strict=True)
            return sum(float(divergence(log_probs(p), log_probs(q)).sum()) for p, q in pairs)

        with contextlib.ExitStack() as stack:
            if modules:
                stack.enter_context(self.ground.probe.replaced(modules))
            return tuple(self.ground.workers.map(work, range(len(self.ground.windows.ids))))

    def _logits(self, window: int, format: str | None, options: Mapping[str, Any]) -> Tensor:
        ground = self.ground
        ids, scored = ground.windows.ids[window], ground.windows.scored[window]
        with Compute(ground.blocks.dtype):
            logits = Through(ground.probe.model, format, **options)(ids[None].to(ground.blocks.device)).logits
        return logits[0, -scored - 1 : -1].clone()


def measure_caches(ground: Ground, tell: Callable[[str], None] = lambda what: None) -> Caches:
    """Every format of the cache, with all weights as they are.

    Raises CheckpointError where the control isn't exactly 0: a QuantizedCache whose exact part holds the whole window,
    so that all of its machinery runs and nothing is packed.
    """
    tell("KV cache: as it is")
    probe = CacheProbe(ground)
    zero = max(map(abs, probe.divergence(FORMATS[0], residual=ground.windows.protocol.context)))
    if zero != 0.0:
        raise CheckpointError(
            f"a KV cache that packs nothing is {zero:.3g} nats away from the model's own, it must be 0: bitfold can't "
            "measure this model's"
        )
    entries = []
    for format in FORMATS:
        tell(f"KV cache: {format}")
        entries.append(CacheEntry(format, probe.divergence(format)))
    return Caches(tuple(entries), zero)
