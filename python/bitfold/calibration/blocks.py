"""The decoder blocks of a transformers model, one at a time from mapped files.

transformers builds the model without weights, so that nothing of an architecture is written down here. What a block is
called with beside its input (rotary embeddings, masks) is taken from the model's own forward pass, in which the blocks'
forwards are replaced by recorders: each notes its arguments and hands its input on. That holds where the blocks are a
chain, one's output the next one's input, and where arguments don't depend on the text: both are checked.

Weights of linear layers, embeddings and experts stay in the dtype they are stored in, mapped, and are converted a strip
at a time where they are multiplied (`Compute`); everything else in a block is small and is converted when it is loaded
(as are experts of kinds that bitfold doesn't know, which aren't).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from bitfold import hf
from bitfold.calibration.experts import OpenExperts, open_experts
from bitfold.experts import expert_name, stacks
from bitfold.layout import Source, Step, groups, read_steps
from bitfold.shards import CheckpointError

_STRIP = 1 << 22  # weights converted at a time


@dataclass(frozen=True)
class Call:
    """What a module is called with beside its first argument, the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Compute(TorchFunctionMode):
    """Products in `dtype` with weights of any other floating-point dtype.

    A thread enters one of its own. `torch.nn.functional.linear` converts the weight, strip by strip; an embedding's
    rows are converted when they have been looked up.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            return self.linear(*args, **kwargs)
        if function is nn.functional.embedding:
            return function(*args, **kwargs).to(self.dtype)
        return function(*args, **kwargs)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype == input.dtype:
            return nn.functional.linear(input, weight, bias)
        n, k = weight.shape
        x = input.reshape(-1, k)
        output = x.new_empty(x.shape[0], n)
        rows = max(1, _STRIP // k)
        for start in range(0, n, rows):
            strip = weight[start : start + rows].to(x.dtype)
            torch.mm(x, strip.t(), out=output[:, start : start + rows])
        if bias is not None:
            output += bias
        return output.view(*input.shape[:-1], n)


class BlockModel:
    """A model of which one decoder block at a time has weights.

    source: a model directory; steps: its tensors; dtype: to compute in; device: where blocks compute. `names` are the
    blocks' dotted names in the order in which they run.

    Raises CheckpointError where the blocks can't be found.
    """

    def __init__(
        self, source: Source, steps: Sequence[Step], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.model = source.model.eval()
        if any(map(stacks, self.model.modules())):
            self.model.set_experts_implementation("eager")  # type: ignore[operator]  # one matrix at a time
        self.names = find_blocks(source)
        owners = groups(source.state)
        self._homes = {name: step for step in steps for name in owners[step.name]}

    @torch.no_grad()
    def first_inputs(self, rows: Tensor, write: Callable[[int, Tensor], None]) -> list[Call]:
        """Run the model up to its first block, on the CPU; returns what each block is called with.

        rows: token ids [samples, tokens]; write: told (sample, [tokens, hidden]).
        """
        hf.check_tokens(self.model, rows)
        outside = {name: home for name, home in self._homes.items() if not self._is_inside(name)}
        calls = None
        with contextlib.ExitStack() as stack:
            for slot, attribute, before in self._fill(self.model, outside):
                stack.callback(slot.__setitem__, attribute, before)
            stack.enter_context(Compute(self.dtype))
            for sample, ids in enumerate(rows):
                hidden, found = self._record(ids)
                if calls is not None and not _alike(calls, found):
                    raise CheckpointError(
                        f"the blocks of {self.source.path} are called with what depends on the text, not only on its "
                        "length: bitfold can't run them one at a time"
                    )
                calls = found if calls is None else calls
                write(sample, hidden[0])
        assert calls is not None
        return [_moved(call, self.device) for call in calls]

    def _is_inside(self, name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in self.names)

    def _record(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The first block's input [1, tokens, hidden], and every block's other arguments."""
        calls: list[Call] = []
        first: list[Tensor] = []
        blocks = [self.model.get_submodule(name) for name in self.names]

        def recorder(index: int) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if index != len(calls) or (first and hidden is not first[0]):
                    raise CheckpointError(
                        f"the blocks of {self.source.path} are no chain in which each takes what the one before it "
                        "returns: bitfold can't run them one at a time"
                    )
                first.append(hidden)
                calls.append(Call(args[1:], kwargs))
                if len(calls) == len(blocks):
                    raise _AllCalled
                return hidden

            return forward

        with contextlib.ExitStack() as stack:
            for index, block in enumerate(blocks):
                block.forward = recorder(index)
                stack.callback(block.__dict__.pop, "forward")
            with contextlib.suppress(_AllCalled):
                self.model(input_ids=ids[None], use_cache=False)
        if len(calls) != len(blocks):
            raise CheckpointError(
                f"the forward pass of {self.source.path} runs {len(calls)} of its {len(blocks)} blocks"
            )
        return first[0], calls

    def load(self, index: int) -> nn.Module:
        """A block with its weights, a module of its own, its experts taken apart (experts.py): what is done to it,
        nobody else sees."""
        prefix = f"{self.names[index]}."
        block = copy.deepcopy(self.model.get_submodule(self.names[index]))
        open_experts(block)
        homes = {name[len(prefix) :]: home for name, home in self._homes.items() if name.startswith(prefix)}
        for _ in self._fill(block, homes):
            pass
        return block.to(self.device)

    def whole(self) -> nn.Module:
        """The model with all its weights, mapped as in `load`, to be run under `Compute`; a module of its own."""
        model = copy.deepcopy(self.model)
        for _ in self._fill(model, self._homes):
            pass
        return model.to(self.device)

    def _fill(self, root: nn.Module, homes: Mapping[str, Step]) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Give tensors of a module their values; yields where each is, and what was there."""
        modules = dict(root.named_modules(remove_duplicate=False))
        by_file = sorted(homes.items(), key=lambda item: str(item[1].parts[0].path))
        read = read_steps(step for _, step in by_file)
        for (name, _), (step, tensors) in zip(by_file, read, strict=True):
            if step.experts and isinstance(modules.get(name.rpartition(".")[0]), OpenExperts):
                for expert, matrix in enumerate(tensors):
                    yield self._put(modules[expert_name(name, expert)], "weight", matrix)
                continue
            owner, _, attribute = name.rpartition(".")
            value = torch.stack(list(tensors)) if step.experts else next(tensors)
            yield self._put(modules[owner], attribute, value)

    def _put(self, module: nn.Module, attribute: str, value: Tensor) -> tuple[dict[str, Any], str, Any]:
        """Give a module one value; returns where it is, and what was there."""
        if not stays_stored(module, attribute, value):
            value = value.to(self.dtype)
        slot: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
        before = slot[attribute]
        slot[attribute] = nn.Parameter(value, requires_grad=False) if slot is module._parameters else value
        return slot, attribute, before


class _AllCalled(Exception):
    """The last block has been called: what comes behind it isn't needed."""


def stays_stored(module: nn.Module, attribute: str, value: Tensor) -> bool:
    """Whether a tensor of a module keeps the dtype it is stored in: weights of linear layers, experts that were taken
    apart, and embeddings, and what is no floating-point number."""
    layer = isinstance(module, (nn.Linear, nn.Embedding)) and attribute == "weight"
    return layer or not value.is_floating_point()


def find_blocks(source: Source) -> tuple[str, ...]:
    """The dotted names of a model's decoder blocks: the items of the one list of modules that is as long as the
    configuration says there are layers, and lies in no other such list.

    Raises CheckpointError where there is no such list, or more than one.
    """
    count = getattr(source.model_config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        name
        for name, module in source.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if count is None or len(outer) != 1:
        what = (
            f"{len(outer)} lists of {count} modules ({', '.join(outer)})"
            if outer
            else f"no list of {count} modules"
        )
        raise CheckpointError(f"the decoder blocks of {source.path} can't be found: its model has {what}")
    return tuple(f"{outer[0]}.{i}" for i in range(count))


def _moved(call: Call, device: torch.device) -> Call:
    args, kwargs = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (call.args, call.kwargs))
    return Call(args, kwargs)


def _alike(one: Any, other: Any) -> bool:
    """Whether arguments of two forward passes are the same, tensors by value."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Call):
        return _alike((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    return one is other or one == other
