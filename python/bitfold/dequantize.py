"""The way back: a model whose quantized modules become plain ones, with the decoded weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitfold.embeddings import QuantEmbedding, ScaledEmbedding
from bitfold.experts import QuantStack, expert_name
from bitfold.nn import PlaneModule, QuantModule, put_module


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Swap a model's quantized modules for nn.Linear and nn.Embedding (a ScaledEmbedding where it scales its output),
    and stacks of experts for parameters, in place, one after another; returns the model.

    dtype: of the decoded weights, and of the biases; None: the first unquantized parameter's, float32 where all are
    quantized. Weights that are shared stay shared.

    Raises ValueError, which names the module, where a weight is beyond the dtype's range.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PlaneModule)}
    if dtype is None:
        packed = {id(part) for module in modules.values() for part in module.parts()}
        floats = (p for p in model.parameters() if p.is_floating_point() and id(p) not in packed)
        dtype = next((p.dtype for p in floats), torch.float32)
    decoded: dict[int, nn.Parameter] = {}  # by the first plane, which shared weights share
    for name, module in modules.items():
        if isinstance(module, QuantStack):
            _unstack(model, name, module, dtype)
            continue
        assert isinstance(module, QuantModule)
        key = id(module.planes()[0])
        if key not in decoded:
            decoded[key] = nn.Parameter(decode_finite(f"{name}.weight", module, dtype))
        plain = _plain(module, decoded[key])
        plain.train(module.training)
        put_module(model, module, plain)
    return model


def _unstack(model: nn.Module, name: str, stack: QuantStack, dtype: torch.dtype) -> None:
    """Swap a stack of experts for the parameter [experts, n, k] that it was made of."""
    weight = stack.planes()[0].new_empty(stack.shape, dtype=dtype)
    for expert in range(len(weight)):
        weight[expert] = stack.matrix(expert).decode(dtype)
        check_range(expert_name(name, expert), weight[expert])
    home, _, leaf = name.rpartition(".")
    experts = model.get_submodule(home)
    delattr(experts, leaf)
    setattr(experts, leaf, nn.Parameter(weight))


def decode_finite(name: str, module: QuantModule, dtype: torch.dtype) -> Tensor:
    """The weight of a module. Raises ValueError where `dtype` can't hold it."""
    weight = module.decode(dtype)
    check_range(name, weight)
    return weight


def check_range(name: str, weight: Tensor) -> None:
    """Raises ValueError, naming the first place, where a weight that was rounded to its dtype has become infinite."""
    bad = ~torch.isfinite(weight)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: element [{row}, {column}] is beyond {weight.dtype}, whose largest is "
            f"{torch.finfo(weight.dtype).max:.6g}; take bfloat16 or float32"
        )


def _plain(module: QuantModule, weight: nn.Parameter) -> nn.Module:
    """The unquantized module; made on the meta device, so that no second weight is ever there."""
    n, k = module.shape
    plain: nn.Linear | nn.Embedding
    if isinstance(module, QuantEmbedding):
        kind = nn.Embedding if module.scale == 1 else ScaledEmbedding
        plain = kind(n, k, padding_idx=module.padding_idx, device="meta")
        if isinstance(plain, ScaledEmbedding):
            plain.scalar_embed_scale = module.scale
    else:
        bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
        plain = nn.Linear(k, n, bias=bias is not None, device="meta")
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    plain.weight = weight
    return plain
