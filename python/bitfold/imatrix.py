"""The importance of a model's columns: mean squares of the inputs of its matrices while it reads a text.

As llama-imatrix does it, so that files are alike: the text's tokens are cut into chunks of equal length, what is left
is dropped; each chunk begins with BOS if the tokenizer puts one in front of texts (in the place of the chunk's first
token), and is read by itself. The square of every input of every matrix of the layers is summed over all tokens, of an
expert over the tokens that are sent to it; of the output head only where it is asked for.

Inputs are seen where torch multiplies with a weight (`torch.nn.functional.linear`) and where a QuantLinear runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfold import hf
from bitfold.gguf.architectures import Placement, placements
from bitfold.gguf.imatrix import Entry, Imatrix
from bitfold.nn import QuantLinear
from bitfold.shards import CheckpointError

CHUNK_SIZE = 512  # tokens

Progress = Callable[[int, int], None]
"""Told after each chunk: the chunks read so far, the chunks to read in all."""


def chunks_of(
    text: str, tokenizer: Any, *, chunk_size: int = CHUNK_SIZE, max_chunks: int | None = None
) -> list[Tensor]:
    """A text cut into rows of `chunk_size` token ids (see the head of this file).

    tokenizer: a transformers tokenizer. Raises ValueError where the text is shorter than a chunk.
    """
    if chunk_size < 2:
        raise ValueError(f"chunk_size is {chunk_size}, it must be at least 2")
    if max_chunks is not None and max_chunks < 1:
        raise ValueError(f"max_chunks is {max_chunks}, it must be at least 1")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and len(ids) > 0 and int(ids[0]) == bos
    count = min(len(ids) // chunk_size, max_chunks or len(ids))
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than a chunk of {chunk_size}: give a longer text or smaller chunks"
        )
    rows = ids[: count * chunk_size].reshape(count, chunk_size).clone()
    if starts_with_bos:
        rows[:, 0] = bos
    return list(rows)


@torch.no_grad()
def measure(
    model: nn.Module,
    chunks: Sequence[Tensor],
    *,
    dataset: str = "",
    head: bool = False,
    progress: Progress | None = None,
) -> Imatrix:
    """The importance of a causal language model's matrices, by their GGUF names.

    Args:
        model: a transformers model of an architecture that GGUF knows too, quantized or not.
        chunks: token ids, each [tokens], all of one length (`chunks_of`).
        dataset: the name of the text, for the file.
        head: measure the output head too, if it is not the embedding.

    Raises CheckpointError for another architecture, ValueError where there are no chunks, a token has no row in the
    embedding, an input is not finite or the model doesn't use one of its matrices.
    """
    if not chunks:
        raise ValueError("chunks is empty, it must have at least one row of token ids")
    kinds = ("blk.", "output.weight") if head else ("blk.",)
    matrices = [
        placement
        for name, placement in placements(model.config).items()
        if name.startswith(kinds) and name.endswith(".weight") and len(placement.shape) > 1
    ]
    recorder = _Recorder(matrices, model)
    device = next(model.parameters()).device
    with recorder:
        for done, ids in enumerate(chunks, 1):
            hf.check_tokens(model, ids)
            # Logits of all tokens would be work for nothing, unless they are what is looked at.
            model(input_ids=ids[None].to(device), use_cache=False, logits_to_keep=0 if head else 1)
            recorder.check()
            if progress is not None:
                progress(done, len(chunks))
    return Imatrix(recorder.entries(), (dataset,), len(chunks), len(chunks[0]))


@dataclass(frozen=True)
class _Place:
    """Where inputs are counted: the GGUF name of a matrix, and which expert of its stack."""

    name: str
    expert: int


class _Recorder(TorchFunctionMode):
    """Sums the squares of inputs, in float64, while it is entered."""

    def __init__(self, matrices: Iterable[Placement], model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._sums: dict[str, Tensor] = {}  # by GGUF name, float64 [experts, columns]
        self._counts: dict[str, Tensor] = {}  # int64 [experts]
        self._modules: dict[nn.Module, list[_Place]] = defaultdict(list)
        self._addresses: dict[int, list[_Place]] = defaultdict(list)  # of the first byte of a weight
        self._stack = ExitStack()
        modules = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        weights = dict(model.named_parameters(remove_duplicate=False))
        for placement in matrices:
            self._watch(placement, modules, weights)

    def _watch(
        self, placement: Placement, modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]
    ) -> None:
        """Note where the inputs of a matrix, or of each of a stack, will be seen."""
        experts = placement.shape[0] if len(placement.shape) == 3 else 1
        self._sums[placement.name] = torch.zeros(experts, placement.shape[-1], dtype=torch.float64)
        self._counts[placement.name] = torch.zeros(experts, dtype=torch.int64)
        known = {**weights, **modules}
        spans = next((spans for spans in placement.sources if all(s.source in known for s in spans)), None)
        if spans is None:
            raise CheckpointError(f"the model has no '{placement.sources[0][0].source}'")
        for expert, span in enumerate(spans):
            place = _Place(placement.name, expert)
            if span.source in modules:
                self._modules[modules[span.source]].append(place)
                continue
            weight = weights[span.source]
            matrix = weight[span.begin // span.shape[1]] if weight.dim() == 3 else weight
            self._addresses[matrix.data_ptr()].append(place)

    def __enter__(self) -> _Recorder:
        for module, places in self._modules.items():
            hook = partial(self._module_runs, places)
            self._stack.callback(module.register_forward_pre_hook(hook).remove)
        if any(len(counts) > 1 for counts in self._counts.values()):
            self._stack.enter_context(_one_expert_at_a_time(self._model))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            self._linear_runs(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _linear_runs(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.data_ptr() in self._addresses:
            self._add(self._addresses[weight.data_ptr()], input)

    def _module_runs(self, places: Sequence[_Place], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._add(places, inputs[0])

    def _add(self, places: Sequence[_Place], x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        squares = rows.double().square().sum(dim=0).cpu()
        for place in places:
            self._sums[place.name][place.expert] += squares
            self._counts[place.name][place.expert] += len(rows)

    def check(self) -> None:
        """Raises ValueError where an input was not finite."""
        for name, sums in self._sums.items():
            if not sums.isfinite().all():
                raise ValueError(
                    f"an input of '{name}' is not finite: another dtype, such as float32, may do"
                )

    def entries(self) -> dict[str, Entry]:
        """What was summed, by name in alphabetical order, as llama-imatrix writes it."""
        unused = [name for name, counts in self._counts.items() if not counts.any()]
        if unused:
            raise ValueError(f"the model read the text without using '{unused[0]}'")
        return {name: Entry(self._sums[name].float(), self._counts[name]) for name in sorted(self._sums)}


@contextmanager
def _one_expert_at_a_time(model: Any) -> Iterator[None]:
    """Let transformers multiply with one expert after the other, each time with a view of its matrix, not with a stack
    at once.
    """
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
