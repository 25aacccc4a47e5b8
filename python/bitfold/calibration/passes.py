"""Runs of one decoder block over the samples that go into it, to see what its layers multiply.

A block is run as often as something is asked, from the inputs that are held for every sample, by `Workers`, a sample on
one thread each. So what a layer gets is always what the block makes of it as it is now, with the layers before it
quantized or rewritten.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitfold.calibration.activations import Activations
from bitfold.calibration.blocks import Call, Compute
from bitfold.calibration.experts import OpenExperts
from bitfold.calibration.workers import Workers
from bitfold.experts import routed, stack_name

T = TypeVar("T")
_WAVE_BYTES = 256 << 20  # inputs of a layer that are held at a time, unless one sample has more


class Passes:
    """A decoder block, its weights loaded, and the samples that go into it.

    name: "model.layers.3"; module: the block, with the weights of its linear layers as they are stored and all else
    in `dtype`, in which it computes; call: what it is called with beside its input.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        call: Call,
        inputs: Activations,
        workers: Workers,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.module, self.call, self.dtype = name, module, call, dtype
        self.samples, self.tokens_of_a_sample = inputs.data.shape[:2]
        self.device = next(module.parameters()).device
        self._inputs, self._workers = inputs, workers

    def linear(self, name: str) -> nn.Linear:
        """A linear layer by its name within the block."""
        layer = self.module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """function of each item, in their order, by threads with one core each."""
        return self._workers.map(function, items)

    def inputs_by_wave(self, name: str) -> Iterator[list[Tensor]]:
        """What a linear layer multiplies, of some samples at a time, in order: [tokens, k] each."""
        for wave in self._waves(self.linear(name).in_features):
            yield [x for (x,) in self._inputs_of([name], wave)]

    def inputs(self, name: str) -> Iterator[Tensor]:
        """What a linear layer multiplies, of each sample in order: [tokens, k]."""
        for wave in self.inputs_by_wave(name):
            yield from wave

    def arguments(self, name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What a part of the block is called with, of each sample in order: args, kwargs, to call it again.

        name: of a submodule ("self_attn"), "" for the block itself. The tensors must not be changed.
        """
        for sample in range(self.samples):
            yield self._workers.map(lambda s: self._arguments_of(name, s), [sample])[0]

    def compute(self, function: Callable[[], Any]) -> Any:
        """Run a function as the block is run: on one thread, without gradients, weights converted where they are
        multiplied."""

        def work(_: int) -> Any:
            with Compute(self.dtype):
                return function()

        return self._workers.map(work, [0])[0]

    # ---- how ----

    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _run(self, sample: int) -> Tensor:
        """The block's output [1, tokens, hidden] for one sample."""
        hidden = self._inputs.data[sample : sample + 1].to(self.device)
        output = self.module(hidden, *self.call.args, **self.call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _waves(self, k: int, bundle: int = 1) -> Iterator[range]:
        """Runs of samples that are worked on at a time, whole bundles: as many as there are workers, if inputs of k
        columns fit."""
        tokens = self.tokens_of_a_sample
        bundles = max(1, min(self._workers.count, _WAVE_BYTES // (4 * tokens * bundle * k)))
        count = bundle * bundles
        for start in range(0, self.samples, count):
            yield range(start, min(start + count, self.samples))

    def _at_experts(self, home: str, samples: range, look: Callable[[tuple[Tensor, Tensor]], T]) -> list[T]:
        """What `look` makes of what experts are called with, of each sample: hidden states [tokens, h] and the numbers
        of the experts [tokens, of a token]. What comes behind them isn't run."""
        experts = self.module.get_submodule(home)
        signature = inspect.signature(experts.forward)
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, _ = signature.bind(*args, **kwargs).args
            seen[threading.get_ident()] = (hidden, index)
            raise _Seen

        def work(sample: int) -> T:
            with Compute(self.dtype):
                with contextlib.suppress(_Seen):
                    self._run(sample)
                return look(seen.pop(threading.get_ident()))

        handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return self._workers.map(work, samples)
        finally:
            handle.remove()

    def _inputs_of(self, names: Sequence[str], samples: range) -> list[list[Tensor]]:
        """What layers multiply, of each sample: [tokens, k] each. One layer, or the same projection of some experts."""
        name = names[0]
        if stack_name(name) != name:
            return self._inputs_of_experts(names, samples)
        address = self.linear(name).weight.data_ptr()

        def work(sample: int) -> list[Tensor]:
            watch = Watch(self.dtype, {address: name}, first_only=True)
            try:
                with watch:
                    self._run(sample)
            except _Seen:
                pass
            return [torch.cat([x.reshape(-1, x.shape[-1]) for x in watch.found[name]])]

        return self._workers.map(work, samples)

    def _inputs_of_experts(self, names: Sequence[str], samples: range) -> list[list[Tensor]]:
        home, leaf = home_of(names[0]), names[0].rpartition(".")[2]
        experts = self.module.get_submodule(home)
        assert isinstance(experts, OpenExperts)

        def look(arguments: tuple[Tensor, Tensor]) -> list[Tensor]:
            hidden, index = arguments
            tokens = {number: found for number, found, _ in routed(index)}
            none = torch.empty(0, dtype=torch.int64, device=hidden.device)
            numbers = map(number_of, names)
            return [experts.inputs(e, leaf, hidden[tokens.get(e, none)]) for e in numbers]

        return self._at_experts(home, samples, look)

    def _arguments_of(self, name: str, sample: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        part = self.module.get_submodule(name)
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))
            raise _Seen

        handle = part.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with Compute(self.dtype):
                self._run(sample)
        except _Seen:
            return found[0]
        finally:
            handle.remove()
        raise ValueError(f"{self.name} never runs its part {name!r}")


def home_of(name: str) -> str:
    """ "mlp.experts" of "mlp.experts.3.down_proj"."""
    return name.rsplit(".", 2)[0]


def number_of(name: str) -> int:
    return int(name.rsplit(".", 2)[1])


class _Seen(Exception):
    """What was looked for has been seen: the rest of the block isn't needed."""


class Watch(Compute):
    """Notes what certain weights are multiplied with.

    wanted: names by the address of the weight's first byte; found: inputs by name, in the order in which they run;
    first_only: stop, by _Seen, when all of them have been seen.
    """

    def __init__(self, dtype: torch.dtype, wanted: Mapping[int, str], first_only: bool = False) -> None:
        super().__init__(dtype)
        self._wanted, self._first_only = wanted, first_only
        self.found: dict[str, list[Tensor]] = {}

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = self._wanted.get(weight.data_ptr())
        if name is not None:
            self.found.setdefault(name, []).append(input)
            if self._first_only and len(self.found) == len(self._wanted):
                raise _Seen
        return super().linear(input, weight, bias)
