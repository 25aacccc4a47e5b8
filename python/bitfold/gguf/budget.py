"""What a GGUF file of a Hugging Face model will cost, from its config.json alone: a row of `bitfold plan`.

Needs no gguf package: names and shapes come from the table of architectures, types from the rules of the file types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bitfold import hf
from bitfold.budget import Budget, Entry, grouped, listed
from bitfold.gguf import architectures, hyperparameters, mixes
from bitfold.gguf.assign import Choice, Facts, Item, assign, fallback_notes, tensor_bytes
from bitfold.gguf.mixes import DOWN, EMBEDDING, FLOATS, GATE, HEAD, OTHER, UP, Mix
from bitfold.layout import Source
from bitfold.memory import REPACKED_BYTES, Memory, Run, activation, kv_cache, run_notes, workspace
from bitfold.rules import ModuleInfo
from bitfold.shards import CheckpointError

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_CLASSES = {HEAD: "head", EMBEDDING: "embeddings", UP: "MLP", GATE: "MLP", DOWN: "MLP", OTHER: "other"}


def gguf_budget(source: Source, mix: Mix, run: Run) -> Budget:
    """What one file type costs; the bytes are those of the tensor data, to which the metadata and the vocabulary come.

    Raises CheckpointError for an architecture that bitfold makes no GGUF files of.
    """
    facts, items = describe(source)
    choices = assign(mix, facts, items, has_importance=mix.name == "Q2_K_S")
    entries = tuple(_entry(choice) for choice in choices)
    return Budget(mix.name, entries, _memory(source, choices, run), tuple(_notes(source, mix, choices, run)))


def describe(source: Source) -> tuple[Facts, list[Item]]:
    """What the rules ask of a model, and the tensors that its GGUF file has before it is quantized."""
    config = source.model_config
    dtype = hf.config_dtype(source.config)
    if dtype not in _TYPES:
        raise CheckpointError(f"{source.path}: config.json names the dtype {dtype}, which GGUF doesn't have")
    text = config.get_text_config()
    facts = Facts(
        architecture=architectures.of_config(config).name,
        layers=int(text.num_hidden_layers),
        heads=int(text.num_attention_heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        experts=architectures.dimensions(config)["e"],
    )
    _, factors = hyperparameters.to_metadata(config)
    items = [Item(name, (len(values),), "F32") for name, values in factors.items()]
    for name, placement in architectures.placements(config).items():
        items.append(Item(name, placement.shape, "F32" if placement.keeps_f32 else _TYPES[dtype]))
    return facts, items


def _entry(choice: Choice) -> Entry:
    return Entry(
        name=choice.name,
        tensor_class=_class_of(choice),
        format=choice.after.lower(),
        quantized=choice.after not in FLOATS,
        shape=choice.shape,
        nbytes=tensor_bytes(choice),
        reason=choice.fallback or choice.reason,
    )


def _class_of(choice: Choice) -> str:
    if not choice.quantized:
        return "rest"
    if len(choice.shape) > 2:
        return "experts"
    return _CLASSES.get(mixes.role_of(choice.name), "attention")


def _memory(source: Source, choices: Sequence[Choice], run: Run) -> Memory:
    linears = (
        (choice.after.lower(), ModuleInfo("linear", choice.shape, is_head=mixes.role_of(choice.name) == HEAD))
        for choice in choices
        if choice.after not in FLOATS and len(choice.shape) == 2 and mixes.role_of(choice.name) != EMBEDDING
    )
    return Memory(
        weights=sum(map(tensor_bytes, choices)),
        repacked=REPACKED_BYTES,
        kv_cache=kv_cache(source, run),
        activation=activation(source.infos, run),
        workspace=max((workspace(format, info, run) for format, info in linears), default=0),
    )


def _notes(source: Source, mix: Mix, choices: Sequence[Choice], run: Run) -> Iterator[str]:
    kept = grouped(
        (f"{choice.after.lower()}: {choice.reason}", choice.name)
        for choice in choices
        if not choice.quantized
    )
    for text, names in kept:
        yield f"{listed(names)} {'stays' if len(names) == 1 else 'stay'} {text}"
    if "output.weight" not in (choice.name for choice in choices):
        yield "the output head shares the weight of token_embd.weight, which is counted once"
    yield from fallback_notes(choices)
    if mix.name == "Q2_K_S":
        yield "it needs an importance file"
    yield from run_notes(source, run)
