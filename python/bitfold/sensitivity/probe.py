"""A model that is run with some of its modules replaced, from the block on in which they lie.

The blocks before it are stubs that hand on what went into it when the model ran as it is; so a weight in the last
block costs one block, not all of them. Weights are mapped, a window of the text is run on one thread with one core
(`Workers`): the same bits come out, however many threads there are, and of an unchanged model exactly those of the
whole run. That is the zero control: it holds where the blocks are a chain, and is checked, not believed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bitfold import hf
from bitfold.calibration.blocks import BlockModel, Compute
from bitfold.calibration.workers import Workers
from bitfold.evaluate import Windows, divergence, log_probs

_CHUNK = 1 << 20  # logits turned to float64 at a time


class Probe:
    """blocks: where the weights are; windows: of the text that is measured on, all of one length.

    `base` are the unquantized model's logits of the scored positions of each window, held: tokens x vocabulary numbers
    of the dtype that is computed in.
    """

    def __init__(self, blocks: BlockModel, windows: Windows, workers: Workers) -> None:
        self.model = blocks.whole()
        self.blocks = [self.model.get_submodule(name) for name in blocks.names]
        self._dtype, self._windows, self._workers = blocks.dtype, windows, workers
        self._thread = threading.local()
        self.base = workers.map(self._logits, range(len(windows.ids)))

    @contextlib.contextmanager
    def replaced(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The model with modules in the places of those of these names."""
        before = {name: self.model.get_submodule(name) for name in modules}
        try:
            for name, module in modules.items():
                self.model.set_submodule(name, module)
            yield
        finally:
            for name, module in before.items():
                self.model.set_submodule(name, module)

    def divergence(self, start: int = 0, inputs: Tensor | None = None) -> tuple[float, ...]:
        """Sums of KL(unquantized || as it is now) over the scored positions of each window, in nats.

        start: the first block that runs, `inputs` [windows, tokens, hidden] going into it; the number of blocks: only
        what comes behind them. Raises ValueError where a logit is not finite.
        """

        def work(window: int) -> float:
            self._thread.hidden = None if inputs is None else inputs[window : window + 1]
            log_sum = 0.0
            logits = self._logits(window)
            if not logits.isfinite().all():
                raise ValueError("a logit is not finite")
            size = max(1, _CHUNK // logits.shape[-1])
            for ours, theirs in zip(logits.split(size), self.base[window].split(size), strict=True):
                log_sum += float(divergence(log_probs(theirs), log_probs(ours)).sum())
            return log_sum

        with self._starting_at(start):
            return tuple(self._workers.map(work, range(len(self._windows.ids))))

    def first_inputs(self) -> list[Tensor]:
        """What goes into the first block of the model as it is now: [1, tokens, hidden] for each window."""

        def work(window: int) -> Tensor:
            with contextlib.suppress(_Reached):
                self._logits(window)
            return self._thread.hidden

        def stop(*args: Any, **kwargs: Any) -> Tensor:
            self._thread.hidden = args[0] if args else kwargs["hidden_states"]
            raise _Reached

        with _forward(self.blocks[0], stop):
            return self._workers.map(work, range(len(self._windows.ids)))

    @contextlib.contextmanager
    def _starting_at(self, start: int) -> Iterator[None]:
        def stub(*_: Any, **__: Any) -> Tensor:
            return self._thread.hidden

        with contextlib.ExitStack() as stack:
            for block in self.blocks[:start]:
                stack.enter_context(_forward(block, stub))
            yield

    def _logits(self, window: int) -> Tensor:
        """Logits [scored, vocabulary] of the positions whose next tokens the window scores."""
        ids, scored = self._windows.ids[window], self._windows.scored[window]
        hf.check_tokens(self.model, ids)
        device = next(self.model.parameters()).device
        with Compute(self._dtype):
            logits = self.model(input_ids=ids[None].to(device), use_cache=False).logits
        return logits[0, -scored - 1 : -1].clone()


class _Reached(Exception):
    """The first block has been called: what comes behind it isn't needed."""


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """A module that runs something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
