"""One decoder block while it is quantized: what a method may ask of it and do to it.

A block is run as often as something is asked, from the inputs that are held for every sample, by `Workers`, a sample on
one thread each. So what a layer gets is always what the block makes of it as it is now, with the layers before it
quantized or rewritten.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitfold.calibration.activations import Activations
from bitfold.calibration.blocks import Call, Compute, stays_stored
from bitfold.calibration.experts import OpenExperts, close_experts
from bitfold.calibration.processes import Processes
from bitfold.calibration.workers import Workers
from bitfold.experts import QuantStack, routed, stack_name
from bitfold.nn import QuantLinear
from bitfold.pipeline import give_back_memory
from bitfold.qtensor import QTensor
from bitfold.recipes import Rule

T = TypeVar("T")
_STRIP = 256  # rows of a Hessian that are one piece of work
_BUNDLE = 2048  # tokens whose products are summed in fp32, unless one sample has more
_EXPERT_BYTES = 512 << 20  # sums of x x^T that are held at a time, unless one expert's are more
_WAVE_BYTES = 256 << 20  # inputs of a layer that are held at a time, unless one sample has more


def bundle_of(tokens: int) -> int:
    """How many samples of so many tokens are summed in fp32."""
    return max(1, _BUNDLE // tokens)


class BlockRun:
    """A decoder block, its weights loaded, and the samples that go into it.

    name: "model.layers.3"; module: the block, with the weights of its linear layers as they are stored and all else
    in `dtype`, in which it computes; rules: what the recipe says of each linear layer that it quantizes, by the name
    within the block ("self_attn.q_proj", "mlp.experts.3.down_proj"); groups: these names, those together that have the
    same input, or are the same projection of different experts, in the order in which they run; never_run: those that
    the samples of all processes don't reach; config: the model's, as transformers reads
    it; stored: the dtypes that the checkpoint will have of what isn't quantized, by name within the block; notes: what
    a method found out before it rounds, by layer.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rules: Mapping[str, Rule],
        call: Call,
        inputs: Activations,
        workers: Workers,
        dtype: torch.dtype,
        processes: Processes | None = None,
        *,
        config: Any = None,
        stored: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.config, self.stored = config, dict(stored or {})
        self.notes: dict[str, Any] = {}
        self.name, self.module, self.rules, self.dtype = name, module, dict(rules), dtype
        self.call, self.samples = call, inputs.data.shape[0]
        self.device = next(module.parameters()).device
        self._inputs, self._workers, self._processes = inputs, workers, processes or Processes()
        self._sums: dict[str, Sums] = {}  # of what was asked for last
        self._routing: dict[str, Routing] = {}

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return self._find_groups() if self.rules else ()

    @cached_property
    def never_run(self) -> tuple[str, ...]:
        grouped = {name for group in self.groups for name in group}
        return tuple(name for name in self.rules if name not in grouped)

    # ---- what a method may ask ----

    def linear(self, name: str) -> nn.Linear:
        """A linear layer by its name within the block."""
        layer = self.module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer

    def hessian(self, name: str) -> Tensor:
        """The sum of x x^T over all inputs x of a linear layer: float32 [k, k], both halves filled.

        Products of about _BUNDLE tokens are summed in fp32, these sums in float64: in an order that depends on nothing
        but the samples, and so well that hardly a bit of the result would depend on it. The last Hessian is kept, and
        serves all layers of a group; of experts, as many as fit into _EXPERT_BYTES are summed at a time. Several
        processes must ask together: each gets the sum over all of them. Raises ValueError where an input isn't finite.
        """
        return self._sums_of(name).hessian

    def magnitudes(self, name: str) -> Tensor:
        """The mean absolute input of each column of a linear layer: float64 [k], summed with the Hessian."""
        sums = self._sums_of(name)
        return sums.sizes / max(1, sums.tokens)

    def tokens(self, name: str) -> int:
        """How many inputs a linear layer has, summed with the Hessian."""
        return self._sums_of(name).tokens

    def routing(self, experts: str) -> Routing:
        """Where the tokens go before anything of the block is quantized; experts: "mlp.experts". Several processes must
        ask together."""
        if experts not in self._routing:
            self._routing[experts] = self._count(experts)
        return self._routing[experts]

    def share_input(self, names: Iterable[str]) -> list[list[str]]:
        """These layers, those together that one Hessian is for."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._first_of(name), []).append(name)
        return list(found.values())

    def forget(self) -> None:
        """What was summed is no longer so: the layers' inputs have changed."""
        self._sums = {}

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """function of each item, in their order, by threads with one core each."""
        return self._workers.map(function, items)

    def inputs(self, name: str) -> Iterator[Tensor]:
        """What a linear layer multiplies, of each sample in order: [tokens, k]."""
        for wave in self._waves(self.linear(name).in_features):
            for (x,) in self._inputs_of([name], wave):
                yield x

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

    def agree(self, value: T) -> T:
        """What the first of several processes has in the place of `value`: all of them go on with the same."""
        return self._processes.from_rank(0, value)

    # ---- what becomes of the block ----

    def settle(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Round tensors to what the checkpoint will hold of them, by name within the block, so that what comes after
        sees the model as it will be loaded."""
        state = self.module.state_dict()
        self.set({name: state[name].to(dtype) for name, dtype in dtypes.items()})

    def set(self, values: Mapping[str, Tensor], *, same: bool = False) -> None:
        """Give tensors of the block, by name within it, other values, in the dtypes that `BlockModel.load` gives
        them; same: they are the values that were there, in another dtype."""
        if not same:
            self.forget()
        for name, value in values.items():
            owner, _, attribute = name.rpartition(".")
            module = self.module.get_submodule(owner)
            old = getattr(module, attribute)
            dtype = value.dtype if stays_stored(module, attribute, value) else self.dtype
            new = value.to(old.device, dtype)
            setattr(
                module,
                attribute,
                nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new,
            )

    def replace(self, name: str, qtensor: QTensor) -> None:
        """Put a quantized layer in the place of a linear one; it is what the block runs from now on."""
        parent, _, attribute = name.rpartition(".")
        setattr(self.module.get_submodule(parent), attribute, QuantLinear(qtensor, self.linear(name).bias))

    def close(self, finished: Mapping[str, QuantStack | Tensor] | None = None) -> None:
        """Put experts together again, as they are stored and run (`close_experts`)."""
        close_experts(self.module, finished)

    def write_outputs(self) -> None:
        """Run the block as it is now, and put what comes out in the place of what went in, for the next block.

        Raises ValueError, naming the block, where it isn't finite.
        """
        self.forget()

        def work(sample: int) -> None:
            with Compute(self.dtype):
                output = self._run(sample)
            if not output.isfinite().all():
                raise ValueError(
                    f"{self.name}: its output for sample {sample} is not finite in {self._dtype_name()}: another "
                    "dtype, such as float32, may do, or a weight is broken"
                )
            self._inputs.write(sample, output[0])

        for wave in self._waves(1):
            self._workers.map(work, wave)

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
        tokens = self._inputs.data.shape[1]
        bundles = max(1, min(self._workers.count, _WAVE_BYTES // (4 * tokens * bundle * k)))
        count = bundle * bundles
        for start in range(0, self.samples, count):
            yield range(start, min(start + count, self.samples))

    def _find_groups(self) -> tuple[tuple[str, ...], ...]:
        """Layers by their input, from the first sample: the same tensor, not an equal one; of experts those that any
        sample reaches."""
        watch = _Watch(self.dtype, {self.linear(name).weight.data_ptr(): name for name in self.rules})

        def work(sample: int) -> None:
            with watch:
                self._run(sample)

        self._workers.map(work, [0])
        groups: dict[Any, list[str]] = {}
        for name, xs in watch.found.items():
            stack = stack_name(name)
            group = groups.setdefault((xs[0].data_ptr(), xs[0].numel()) if stack == name else stack, [])
            if stack == name:
                group.append(name)
            elif not group:
                counts = self.routing(_home_of(name)).counts
                group += [
                    other for other in self.rules if stack_name(other) == stack and counts[_number_of(other)]
                ]
        return tuple(tuple(group) for group in groups.values())

    def _first_of(self, name: str) -> str:
        """The layer whose Hessian is this one's."""
        if stack_name(name) != name:
            return name
        return next(group for group in self.groups if name in group)[0]

    def _count(self, home: str) -> Routing:
        experts = self.module.get_submodule(home)
        assert isinstance(experts, OpenExperts)
        counts, sizes = torch.zeros(experts.count, dtype=torch.float64), None

        def work(arguments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            hidden, index = arguments
            return (
                index.flatten().bincount(minlength=experts.count).cpu().double(),
                hidden.abs().sum(0, dtype=torch.float64).cpu(),
            )

        tokens = torch.zeros(1, dtype=torch.float64)
        for wave in self._waves(1):
            for found, magnitudes in self._at_experts(home, wave, work):
                counts += found
                sizes = magnitudes if sizes is None else sizes + magnitudes
            tokens += len(wave) * self._inputs.data.shape[1]
        assert sizes is not None
        for sums in (counts, sizes, tokens):
            self._processes.sum_(sums)
        return Routing(counts.long(), (sizes / tokens).to(self.device))

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
            watch = _Watch(self.dtype, {address: name}, first_only=True)
            try:
                with watch:
                    self._run(sample)
            except _Seen:
                pass
            return [torch.cat([x.reshape(-1, x.shape[-1]) for x in watch.found[name]])]

        return self._workers.map(work, samples)

    def _inputs_of_experts(self, names: Sequence[str], samples: range) -> list[list[Tensor]]:
        home, leaf = _home_of(names[0]), names[0].rpartition(".")[2]
        experts = self.module.get_submodule(home)
        assert isinstance(experts, OpenExperts)

        def look(arguments: tuple[Tensor, Tensor]) -> list[Tensor]:
            hidden, index = arguments
            tokens = {number: found for number, found, _ in routed(index)}
            none = torch.empty(0, dtype=torch.int64, device=hidden.device)
            numbers = map(_number_of, names)
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

    def _sums_of(self, name: str) -> Sums:
        first = self._first_of(name)
        if first not in self._sums:
            self.forget()  # their memory goes before the next ones come
            group = next(group for group in self.groups if first in group)
            k = self.linear(first).in_features
            count = max(1, _EXPERT_BYTES // (8 * k * k)) if stack_name(first) != first else 1
            start = group.index(first)
            names = group[start : start + count]
            self._sums = dict(zip(names, self._sum(names), strict=True))
        return self._sums[first]

    def _sum(self, names: Sequence[str]) -> list[Sums]:
        products, sizes = self._sum_products(names)
        found = []
        for name in names:
            sums, size = products.pop(0), sizes.pop(0)
            self._processes.sum_(sums)
            self._processes.sum_(size)
            found.append(Sums(self._symmetric(name, sums), size[:-1], int(size[-1])))
            del sums
            give_back_memory()  # a solver is to come
        return found

    def _symmetric(self, name: str, sums: Tensor) -> Tensor:
        """The lower half of a Hessian in float64, both of them in float32."""
        k = len(sums)
        hessian = torch.empty(k, k, dtype=torch.float32, device=self.device)
        for start in range(0, k, _STRIP):
            stop = min(start + _STRIP, k)
            hessian[start:stop, :stop] = sums[start:stop, :stop]
            hessian[:start, start:stop] = hessian[start:stop, :start].t()
        if not hessian.diagonal().isfinite().all():
            raise ValueError(
                f"{self.name}: the inputs of {name} are not finite in {self._dtype_name()}: another dtype, such as "
                "float32, may do, or a weight is broken"
            )
        return hessian

    def _sum_products(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """For each layer the lower half of the sum of x x^T over this process's samples, float64 [k, k]; the sum of
        |x|, and behind it the number of tokens, float64 [k + 1]."""
        k = self.linear(names[0]).in_features
        sums = [torch.zeros(k, k, dtype=torch.float64, device=self.device) for _ in names]
        sizes = [torch.zeros(k + 1, dtype=torch.float64, device=self.device) for _ in names]
        bundle = bundle_of(self._inputs.data.shape[1])
        # Of its experts, a token goes to a few.
        choices = getattr(self.config, "num_experts_per_tok", 1) if stack_name(names[0]) != names[0] else 1
        for wave in self._waves(k * min(len(names), choices), bundle):
            xs = self._inputs_of(names, wave)
            bundles = [xs[i : i + bundle] for i in range(0, len(xs), bundle)]
            parts = [[torch.cat([x[n] for x in some]).float() for some in bundles] for n in range(len(names))]
            del xs, bundles
            for size, own in zip(sizes, parts, strict=True):
                size[k] += sum(len(x) for x in own)

            def add(piece: tuple[int, int], parts: list[list[Tensor]] = parts) -> None:
                """One strip of one layer, all bundles of the wave one after the other."""
                layer, start = piece
                stop = min(start + _STRIP, k)
                for x in parts[layer]:
                    if len(x):
                        sums[layer][start:stop, :stop] += x[:, start:stop].t() @ x[:, :stop]
                        sizes[layer][start:stop] += x[:, start:stop].abs().sum(0, dtype=torch.float64)

            self._workers.map(
                add, [(n, start) for n in range(len(names)) for start in reversed(range(0, k, _STRIP))]
            )
        return sums, sizes


@dataclass(frozen=True, eq=False)
class Sums:
    """Over all inputs of a layer. hessian: float32 [k, k]; sizes: of absolute values, float64 [k]; tokens: how many."""

    hessian: Tensor
    sizes: Tensor
    tokens: int


@dataclass(frozen=True, eq=False)
class Routing:
    """counts: how many tokens each expert gets, int64 [experts]; magnitudes: the mean absolute value of each column of
    what the router and the experts are given, float64 [h]."""

    counts: Tensor
    magnitudes: Tensor


def _home_of(name: str) -> str:
    """ "mlp.experts" of "mlp.experts.3.down_proj"."""
    return name.rsplit(".", 2)[0]


def _number_of(name: str) -> int:
    return int(name.rsplit(".", 2)[1])


class _Seen(Exception):
    """What was looked for has been seen: the rest of the block isn't needed."""


class _Watch(Compute):
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
