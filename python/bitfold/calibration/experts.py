"""The experts of a decoder block while it is quantized: each a module of its own, its matrices linear layers.

So a method sees "mlp.experts.3.down_proj" as it sees any layer, and what it multiplies are the tokens that the router
sends to this expert. Before the block is stored its experts are put together again, as what runs when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.experts import DOWN, GATE_UP, QuantExperts, QuantStack, count, mix, obstacle
from bitfold.nn import QuantLinear, put_module


class Expert(nn.Module):
    """The matrices of one expert, without values at first."""

    def __init__(self, gate_up: tuple[int, ...], down: tuple[int, ...]) -> None:
        super().__init__()
        self.gate_up_proj: nn.Module = nn.Linear(gate_up[-1], gate_up[-2], bias=False, device="meta")
        self.down_proj: nn.Module = nn.Linear(down[-1], down[-2], bias=False, device="meta")


class OpenExperts(nn.Module):
    """The experts of a layer by their numbers: as QuantExperts computes, matrix by matrix."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        shapes = [tuple(getattr(module, leaf).shape) for leaf in (GATE_UP, DOWN)]
        self.act_fn: Any = module.act_fn
        self.count = count(module)
        for number in range(self.count):
            self.add_module(str(number), Expert(*shapes))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return mix(self.run_expert, hidden_states, top_k_index, top_k_weights)

    def run_expert(self, number: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"{number}.{DOWN}")(self.inputs(number, DOWN, x))

    def inputs(self, number: int, leaf: str, x: Tensor) -> Tensor:
        """What a matrix of an expert multiplies where the expert is given x [tokens, h]."""
        if leaf == GATE_UP:
            return x
        gate, up = self.get_submodule(f"{number}.{GATE_UP}")(x).chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def matrices(self, leaf: str) -> list[Any]:
        """A projection of all experts."""
        return [self.get_submodule(f"{number}.{leaf}") for number in range(self.count)]


def open_experts(block: nn.Module) -> None:
    """Take the experts of a block apart, where bitfold knows how they compute; their matrices are without values."""
    for module in list(block.modules()):
        if count(module) and obstacle(module) is None:
            put_module(block, module, OpenExperts(module))


def opened(block: nn.Module) -> Iterator[tuple[str, OpenExperts]]:
    """The experts of a block that have been taken apart, by name."""
    for name, module in block.named_modules():
        if isinstance(module, OpenExperts):
            yield name, module


def close_experts(block: nn.Module, finished: Mapping[str, QuantStack | Tensor] | None = None) -> None:
    """Put the experts of a block together again; finished: what the projections of all experts are, by name within the
    block ("mlp.experts.down_proj"), None: what has become of them."""
    for name, module in list(opened(block)):
        gate_up, down = (
            _as_attribute(_stacked(module.matrices(leaf)) if finished is None else finished[f"{name}.{leaf}"])
            for leaf in (GATE_UP, DOWN)
        )
        put_module(block, module, QuantExperts(gate_up, down, module.act_fn))


def _as_attribute(stack: QuantStack | Tensor) -> QuantStack | nn.Parameter:
    return nn.Parameter(stack, requires_grad=False) if isinstance(stack, Tensor) else stack


def _stacked(matrices: list[Any]) -> QuantStack | Tensor:
    """The projections of all experts under one name."""
    if not isinstance(matrices[0], QuantLinear):
        return torch.stack([matrix.weight.detach() for matrix in matrices])
    first = matrices[0]
    stack = QuantStack.empty(
        first.format, (len(matrices), *first.shape), first.planes()[0].device, first.layout
    )
    stack.activations = first.activations
    for number, matrix in enumerate(matrices):
        stack.put(number, matrix.qtensor)
    return stack
