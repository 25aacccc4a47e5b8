"""The model and the texts, made ready to be measured on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import _C, hf, layout
from bitfold.calibration import data, job, overlap
from bitfold.calibration.blocks import BlockModel
from bitfold.calibration.workers import Workers
from bitfold.evaluate import Estimate, Windows, cut, ratio
from bitfold.layout import Source
from bitfold.rules import Assignment
from bitfold.sensitivity.candidates import Candidate, parts_of
from bitfold.sensitivity.probe import Probe
from bitfold.sensitivity.walk import Ground, walk

TOKENS = 4096  # of the text, unless more are asked for
CONTEXT = 512  # of a window, unless the model's is smaller: many windows make small standard errors


@dataclass(frozen=True)
class Texts:
    """What is measured on, and what is calibrated on.

    text: the words themselves; tokens: of it to use, 0 for all; context: tokens of a window, 0: the model's, at most
    512; calibration: as `bitfold.quantize_calibrated` takes it, "": none; samples, sequence_length, seed: of it.
    """

    text: str
    tokens: int = TOKENS
    context: int = 0
    calibration: str | Path = ""
    samples: int = data.SAMPLES
    sequence_length: int | None = None
    seed: int = 0


@contextlib.contextmanager
def prepare(
    path: str | Path,
    texts: Texts,
    include: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[Ground]:
    """The ground for measuring; weights are mapped, the logits of the text are held.

    Raises CheckpointError where the directory is no unquantized model or its blocks can't be run one at a time,
    ValueError where a text is empty or too short.
    """
    if not texts.text.strip():
        raise ValueError("the text is empty")
    source = layout.read_source(Path(path))
    parts = parts_of(source, include)
    kept = {name: Assignment(None, None, "") for name in source.infos}
    blocks = BlockModel(source, layout.steps(source, kept), dtype, torch.device(device))
    tokenizer = hf.load_tokenizer(path)
    windows = windows_of(source, tokenizer, texts.text, texts.tokens, texts.context, dtype)
    calibration = calibration_of(source, tokenizer, texts)
    with Workers() as workers:
        probe = Probe(blocks, windows, workers)
        names = [name for part in parts for name in part.names]
        unquantized = {name: probe.model.get_submodule(name) for name in names}
        yield Ground(source, blocks, probe, windows, calibration, workers, parts, unquantized)


def windows_of(
    source: Source, tokenizer: Any, text: str, tokens: int, context: int, dtype: torch.dtype
) -> Windows:
    """A text as a model is measured on it. tokens: 0: all; context: 0: the model's, at most CONTEXT."""
    context = context or hf.context_up_to(source.model_config, CONTEXT)
    return cut(text, tokenizer, context=context, dtype=dtype, max_tokens=tokens or None)


def calibration_of(source: Source, tokenizer: Any, texts: Texts) -> data.Calibration | None:
    """The rows to calibrate on, those that `bitfold.quantize_calibrated` takes; None where no text is given."""
    if not texts.calibration:
        return None
    return data.read(
        texts.calibration,
        tokenizer,
        samples=texts.samples,
        sequence_length=texts.sequence_length or hf.context_up_to(source.model_config, data.SEQUENCE_LENGTH),
        seed=texts.seed,
    )


def model_sha256(source: Source, workers: Workers) -> str:
    """Of the model's configuration and weights."""
    kept = {name: Assignment(None, None, "") for name in source.infos}
    return job.model_sha256(source, layout.steps(source, kept, compare_tied=False), workers)


def fingerprint(ground: Ground) -> dict[str, str]:
    """What must be the same for two measurements to belong together, by the name that a message has."""
    rows = ground.calibration
    protocol = ground.windows.protocol
    return {
        "model": model_sha256(ground.source, ground.workers),
        "text": protocol.text_sha256,
        "length of windows": f"context {protocol.context}, stride {protocol.stride}, BOS {protocol.bos}",
        "calibration text": "none" if rows is None else rows.sha256,
        "dtype": protocol.dtype,
        "device": ground.blocks.device.type,
        "version of bitfold": _C.__version__,
    }


def seen(ground: Ground) -> dict[str, object]:
    """Hashes of the text's passages, so that a model whose formats were chosen by them can be told from one that has
    never seen them."""
    return overlap.to_json(overlap.sample_of(ground.windows.ids))


def shared_passages(ground: Ground) -> float:
    """Which share of the text's passages is calibrated on too, 0 to 1: there calibrated formats look better than they
    are."""
    if ground.calibration is None:
        return 0.0
    return overlap.share(overlap.sample_of(ground.windows.ids), overlap.sample_of(ground.calibration.ids))


def build(
    ground: Ground, assignment: Mapping[str, Candidate], tell: Callable[[str], None] = lambda what: None
) -> dict[str, nn.Module]:
    """Quantized modules by name, as `bitfold.quantize_checkpoint` or, where one of the candidates is calibrated,
    `bitfold.quantize_calibrated` makes them. assignment: by the parts' names; who isn't in it is kept."""
    if not any(candidate.needs_calibration for candidate in assignment.values()):
        ground = dataclasses.replace(ground, calibration=None)
    made: dict[str, nn.Module] = {}
    for stop in walk(ground, made, with_text=False):
        candidate = assignment.get(stop.part.name)
        if candidate is not None and candidate.format is not None:
            tell(f"{stop.part.name} as {candidate}")
            made.update(stop.modules(stop.round(candidate)))
    return made


def divergence(ground: Ground, modules: Mapping[str, nn.Module]) -> tuple[float, ...]:
    """Sums of KL over each window with modules in the places of the model's own."""
    with ground.probe.replaced(modules):
        return ground.probe.divergence()


def mean(ground: Ground, window_kl: Sequence[float]) -> Estimate:
    """In nats a token."""
    return ratio(window_kl, ground.windows.scored)
