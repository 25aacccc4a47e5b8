"""Mixtures of experts on quantized matrices.

transformers keeps the experts of a layer in two parameters of three dimensions, `gate_up_proj` [experts, 2 i, h] (the
gate's rows before those of the up projection) and `down_proj` [experts, h, i]: a stack of matrices each, one for every
expert. A QuantStack takes the place of such a parameter, with the planes of all of them under one name; QuantExperts
that of the module around it. A token is multiplied with the packed matrices of the experts that its router sends it to,
and no others are read.

What the router decides stays what it was: routers are no part of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import ops
from bitfold.formats import parse, plane_shapes
from bitfold.nn import PRODUCTS, Multiplies, put_module
from bitfold.qtensor import QTensor

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What transformers says of experts whose forward pass is the one of QuantExperts.
_USUAL = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of experts among a module's own parameters, by name: what has three dimensions, none of size 1, and is
    no convolution."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, QuantStack)):
        return {}
    parameters = module.named_parameters(recurse=False)
    return {name: p for name, p in parameters if p.dim() == 3 and min(p.shape) > 1}


def count(module: nn.Module) -> int:
    """How many experts a module holds, 0 for what holds none."""
    if isinstance(module, QuantExperts):
        return module.num_experts
    return next((len(stack) for stack in stacks(module).values()), 0)


def obstacle(module: nn.Module) -> str | None:
    """Why the stacks of a module can't be quantized ("it is ..."), None if they can."""
    if isinstance(module, QuantExperts):
        return None
    kind = type(module).__name__
    found = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if set(found) != {GATE_UP, DOWN}:
        return f"it is a stack in a {kind}, which has {', '.join(found)}, not {GATE_UP} and {DOWN}"
    apply_gate = getattr(type(module), "_apply_gate", None)
    usual = all(getattr(module, name, None) == value for name, value in _USUAL.items())
    if not usual or getattr(module, "has_post_expert_norm", False) or not _is_usual_gate(apply_gate):
        return (
            f"it is a stack in a {kind}, which computes with its experts in a way that bitfold doesn't know"
        )
    (count, both, hidden), down = found[GATE_UP], found[DOWN]
    if down != (count, hidden, both // 2) or not callable(getattr(module, "act_fn", None)):
        return f"it is a stack in a {kind}, whose {GATE_UP} and {DOWN} don't fit each other"
    return None


def _is_usual_gate(function: Any) -> bool:
    """Whether it is transformers' own act_fn(gate) * up."""
    return getattr(function, "__name__", "") == "_default_apply_gate"


def expert_name(stack: str, expert: int) -> str:
    """What one matrix of a stack is called: "mlp.experts.down_proj" and 3 make "mlp.experts.3.down_proj"."""
    home, _, leaf = stack.rpartition(".")
    return f"{home}.{expert}.{leaf}"


def stack_name(name: str) -> str:
    """`expert_name` undone; what is no matrix of a stack keeps its name."""
    home, _, leaf = name.rpartition(".")
    home, _, expert = home.rpartition(".")
    return f"{home}.{leaf}" if expert.isdigit() and leaf in (GATE_UP, DOWN) else name


class QuantStack(Multiplies):
    """The matrices [n, k] of all experts in one format: each plane has the experts as its first dimension.

    shape: (experts, n, k); planes: by name, as `plane_shapes` of one matrix has them behind the first dimension.

    Raises ValueError where a plane is missing, unknown, or of another shape or dtype.
    """

    def __init__(
        self, format: str, shape: tuple[int, ...], planes: Mapping[str, Tensor], layout: str = "rows"
    ) -> None:
        super().__init__()
        parsed = parse(format)
        experts, n, k = shape
        parsed.check_columns(k)
        wanted = plane_shapes(parsed, n, k, layout)
        if set(planes) != set(wanted):
            raise ValueError(
                f"planes are {', '.join(planes) or 'none'}; for {parsed} they must be {', '.join(wanted)}"
            )
        for law in parsed.planes:
            plane, whole = planes[law.name], (experts, *wanted[law.name])
            if plane.dtype != law.dtype or tuple(plane.shape) != whole:
                raise ValueError(
                    f"plane {law.name} is {plane.dtype} of shape {list(plane.shape)}; for {experts} matrices {n}x{k} "
                    f"in {parsed} it must be {law.dtype} of shape {list(whole)}"
                )
        ordered = {law.name: planes[law.name] for law in parsed.planes}
        self._hold(parsed.canonical, layout, (experts, n, k), ordered)

    @classmethod
    def empty(
        cls,
        format: str,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        layout: str = "rows",
    ) -> QuantStack:
        """One with uninitialised planes, to load or put matrices into."""
        parsed = parse(format)
        experts, n, k = shape
        shapes = plane_shapes(parsed, n, k, layout)
        planes = {
            law.name: torch.empty((experts, *shapes[law.name]), dtype=law.dtype, device=device)
            for law in parsed.planes
        }
        return cls(format, shape, planes, layout)

    def matrix(self, expert: int) -> QTensor:
        """One expert's matrix; shares the planes of this module."""
        planes = {name: plane[expert] for name, plane in zip(self.plane_names, self.planes(), strict=True)}
        _, n, k = self.shape
        return QTensor(self.format, (n, k), planes, self.layout)

    @torch.no_grad()
    def put(self, expert: int, qtensor: QTensor) -> None:
        """Copy a matrix of the same format and shape into its place."""
        assert (qtensor.format, qtensor.shape, qtensor.g_idx) == (self.format, self.shape[1:], None)
        for name, plane in zip(self.plane_names, self.planes(), strict=True):
            plane[expert].copy_(qtensor.planes[name])

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [..., k] times one expert's matrix: [..., n], in the dtype of x."""
        _, n, k = self.shape
        planes = [plane[expert] for plane in self.planes()]
        if self._op != "linear":
            return PRODUCTS[self._op](x, planes, self.format, n, k, None, self._activations)
        return ops.linear(x, planes, self.format, n, k, None, self.layout, self._activations.kind)

    def extra_repr(self) -> str:
        experts, n, k = self.shape
        activations = "" if self._activations.is_float else f", activations={self._activations}"
        return f"experts={experts}, in_features={k}, out_features={n}, format={self.format}{activations}"


class QuantExperts(nn.Module):
    """The experts of a layer: act_fn(gate) * up, then down, of each expert for the tokens that are sent to it.

    gate_up_proj, down_proj: a QuantStack, or a parameter [experts, n, k] that isn't quantized; act_fn: between them.
    What it returns is what transformers' experts return, summed in the same order, which depends on nothing but the
    tokens and where they are sent.
    """

    def __init__(
        self, gate_up_proj: nn.Parameter | QuantStack, down_proj: nn.Parameter | QuantStack, act_fn: Any
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    @classmethod
    def of(cls, module: nn.Module) -> QuantExperts:
        """The same experts as a module of transformers has, on the same parameters (`obstacle` must be None)."""
        if isinstance(module, QuantExperts):
            return module
        assert obstacle(module) is None
        experts = cls(module.gate_up_proj, module.down_proj, module.act_fn)  # type: ignore[arg-type]
        return experts.train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, h]; top_k_index, top_k_weights [tokens, experts of a token]: to which experts each
        token goes, and how much of what they return comes back. Returns [tokens, h]."""
        return mix(self.expert, hidden_states, top_k_index, top_k_weights)

    def expert(self, expert: int, x: Tensor) -> Tensor:
        """What one expert makes of x [tokens, h]."""
        gate, up = _product(self.gate_up_proj, expert, x).chunk(2, dim=-1)
        return _product(self.down_proj, expert, self.act_fn(gate) * up)


def put_stack(model: nn.Module, name: str, stack: QuantStack) -> None:
    """Put a stack in the place of the parameter, or of the stack, that a model has under a name; what is around it
    becomes a QuantExperts.

    Raises ValueError where that can't be ("the model doesn't have it", "it is a ...").
    """
    home, _, leaf = name.rpartition(".")
    try:
        old: Any = model.get_submodule(home)
    except AttributeError:
        old = None
    if not home or not hasattr(old, leaf):
        raise ValueError("the model doesn't have it")
    why = obstacle(old)
    if why is not None:
        raise ValueError(why)
    shape = tuple(getattr(old, leaf).shape)
    if shape != stack.shape:
        raise ValueError(f"it is {list(stack.shape)}, but the model's configuration makes it {list(shape)}")
    new = QuantExperts.of(old)
    delattr(new, leaf)  # a parameter: a module can't take its name
    setattr(new, leaf, stack)
    if new is not old:
        put_module(model, old, new)


def _product(stack: Any, expert: int, x: Tensor) -> Tensor:
    return stack(x, expert) if isinstance(stack, QuantStack) else nn.functional.linear(x, stack[expert])


def mix(expert: Callable[[int, Tensor], Tensor], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of what experts make of the tokens that go to them: x [tokens, h] -> [tokens, h].

    index, weights: [tokens, experts of a token]. Experts come in the order of their numbers, each once, and only those
    that a token goes to.
    """
    total = torch.zeros_like(x)
    for number, tokens, places in routed(index):
        part = expert(number, x[tokens]) * weights[tokens, places, None]
        total.index_add_(0, tokens, part.to(total.dtype))
    return total


def routed(index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that a token goes to: its number, the tokens in their order, and which of a token's choices it
    is, int64 [tokens of the expert] both. index: [tokens, experts of a token]."""
    if index.numel() == 0:
        return
    choices = index.shape[-1]
    order = index.flatten().argsort(stable=True)
    counts = index.flatten().bincount().tolist()
    for number, found in enumerate(order.split(counts)):
        if counts[number]:
            yield number, found // choices, found % choices
