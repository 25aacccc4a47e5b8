"""One decoder block while it is quantized: what a method may ask of it and do to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitfold.calibration.activations import Activations
from bitfold.calibration.blocks import Call, Compute, stays_stored
from bitfold.calibration.experts import OpenExperts, close_experts
from bitfold.calibration.passes import Passes, Watch, home_of, number_of
from bitfold.calibration.processes import Processes
from bitfold.calibration.ranges import Ranges, of_sample
from bitfold.calibration.workers import Workers
from bitfold.experts import QuantStack, stack_name
from bitfold.nn import QuantLinear
from bitfold.pipeline import give_back_memory
from bitfold.qtensor import QTensor
from bitfold.rules import Rule

T = TypeVar("T")
_STRIP = 256  # rows of a Hessian that are one piece of work
_BUNDLE = 2048  # tokens whose products are summed in fp32, unless one sample has more
_EXPERT_BYTES = 512 << 20  # sums of x x^T that are held at a time, unless one expert's are more


def bundle_of(tokens: int) -> int:
    """How many samples of so many tokens are summed in fp32."""
    return max(1, _BUNDLE // tokens)


class BlockRun(Passes):
    """A decoder block (passes.py) and what the recipe has for it.

    rules: what the recipe says of each linear layer that it quantizes, by the name within the block
    ("self_attn.q_proj", "mlp.experts.3.down_proj"); groups: these names, those together that have the same input, or
    are the same projection of different experts, in the order in which they run; never_run: those that the samples of
    all processes don't reach; config: the model's, as transformers reads it; stored: the dtypes that the checkpoint
    will have of what isn't quantized, by name within the block; notes: what a method found out before it rounds, by
    layer.
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
        super().__init__(name, module, call, inputs, workers, dtype)
        self.config, self.stored = config, dict(stored or {})
        self.notes: dict[str, Any] = {}
        self.rules, self._processes = dict(rules), processes or Processes()
        self._sums: dict[str, Sums] = {}  # of what was asked for last
        self._ranges: dict[str, Ranges] = {}
        self._routing: dict[str, Routing] = {}

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return self._find_groups() if self.rules else ()

    @cached_property
    def never_run(self) -> tuple[str, ...]:
        grouped = {name for group in self.groups for name in group}
        return tuple(name for name in self.rules if name not in grouped)

    # ---- what a method may ask ----

    def hessian(self, name: str) -> Tensor:
        """The sum of x x^T over all inputs x of a linear layer: float32 [k, k], both halves filled.

        Products of about _BUNDLE tokens are summed in fp32, these sums in float64: in an order that depends on nothing
        but the samples, and so well that hardly a bit of the result would depend on it. The last Hessian is kept, and
        serves all layers of a group; of experts, as many as fit into _EXPERT_BYTES are summed at a time. Several
        processes must ask together: each gets the sum over all of them. Raises ValueError where an input isn't finite.
        """
        return self._sums_of(name).hessian

    def take_hessian(self, name: str) -> Tensor:
        """The Hessian, for whoever is the last to ask for it: it is kept only where a layer behind this one shares it,
        so that what solves may let it go."""
        hessian = self._sums_of(name).hessian
        if stack_name(name) != name:
            del self._sums[name]
        elif name == next(group for group in self.groups if name in group)[-1]:
            self.forget()
        return hessian

    def magnitudes(self, name: str) -> Tensor:
        """The mean absolute input of each column of a linear layer: float64 [k], summed with the Hessian."""
        sums = self._sums_of(name)
        return sums.sizes / max(1, sums.tokens)

    def tokens(self, name: str) -> int:
        """How many inputs a linear layer has, summed with the Hessian."""
        return self._sums_of(name).tokens

    def ranges(self, name: str) -> Ranges:
        """How large the inputs of a linear layer are, sample by sample (ranges.py): kept for all layers of a group, and
        found at once for all experts. Several processes must ask together: each gets those of all samples. Raises
        ValueError where an input isn't finite."""
        first = self._first_of(name)
        if first not in self._ranges:
            is_expert = stack_name(first) != first
            names = next(group for group in self.groups if first in group) if is_expert else (first,)
            self._ranges.update(zip(names, self._measure(names), strict=True))
        return self._ranges[first]

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
        self._sums, self._ranges = {}, {}

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

    def replace(self, name: str, qtensor: QTensor, kept: Mapping[str, Tensor] | None = None) -> None:
        """Put a quantized layer in the place of a linear one; it is what the block runs from now on, activations
        included. kept: what they take (`ranges.kept_for`)."""
        kept = kept or {}
        activations = self.rules[name].activations.having(
            step="x_scale" in kept, outliers="outlier_weight" in kept
        )
        parent, _, attribute = name.rpartition(".")
        quantized = QuantLinear(qtensor, self.linear(name).bias, activations, **kept)
        setattr(self.module.get_submodule(parent), attribute, quantized)

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

    def _find_groups(self) -> tuple[tuple[str, ...], ...]:
        """Layers by their input, from the first sample: the same tensor, not an equal one; of experts those that any
        sample reaches."""
        watch = Watch(self.dtype, {self.linear(name).weight.data_ptr(): name for name in self.rules})

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
                counts = self.routing(home_of(name)).counts
                group += [
                    other for other in self.rules if stack_name(other) == stack and counts[number_of(other)]
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
            tokens += len(wave) * self.tokens_of_a_sample
        assert sizes is not None
        for sums in (counts, sizes, tokens):
            self._processes.sum_(sums)
        return Routing(counts.long(), (sizes / tokens).to(self.device))

    def _measure(self, names: Sequence[str]) -> list[Ranges]:
        """Of layers with inputs of the same width, in one pass over the samples."""
        rows: list[list[tuple[Tensor, Tensor]]] = []  # of each sample, of each layer
        for wave in self._waves(self.linear(names[0]).in_features * self._shares(names)):
            inputs = self._inputs_of(names, wave)
            rows += self._workers.map(lambda xs: [of_sample(x) for x in xs], inputs)
            del inputs
        found = []
        for name, own in zip(names, zip(*rows, strict=True), strict=True):
            largest, squares = (self._processes.join(torch.stack(part)) for part in zip(*own, strict=True))
            self._check_finite(name, largest)
            found.append(Ranges(largest, squares))
        return found

    def _shares(self, names: Sequence[str]) -> int:
        """How many of these layers a token goes to: of experts a few."""
        choices = getattr(self.config, "num_experts_per_tok", 1) if stack_name(names[0]) != names[0] else 1
        return min(len(names), choices)

    def _check_finite(self, name: str, values: Tensor) -> None:
        if not values.isfinite().all():
            raise ValueError(
                f"{self.name}: the inputs of {name} are not finite in {self._dtype_name()}: another dtype, such as "
                "float32, may do, or a weight is broken"
            )

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
        self._check_finite(name, hessian.diagonal())
        return hessian

    def _sum_products(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """For each layer the lower half of the sum of x x^T over this process's samples, float64 [k, k]; the sum of
        |x|, and behind it the number of tokens, float64 [k + 1]."""
        k = self.linear(names[0]).in_features
        sums = [torch.zeros(k, k, dtype=torch.float64, device=self.device) for _ in names]
        sizes = [torch.zeros(k + 1, dtype=torch.float64, device=self.device) for _ in names]
        bundle = bundle_of(self.tokens_of_a_sample)
        for wave in self._waves(k * self._shares(names), bundle):
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
