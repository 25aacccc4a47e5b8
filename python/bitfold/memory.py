"""What it takes to run a model, before anything is computed. The memory is the sum of

    weights      the planes of quantized modules and all tensors that are kept: as in the checkpoint
    repacked     copies of weights in another order for speed: none today
    KV cache     2 * layers * KV heads * head size * context * batch numbers of the model's dtype; of int8, fp8 and
                 int4 the blocks and buffers that bitfold.QuantizedCache allocates for them (docs/kv-cache.md)
    activation   the largest block of linear layers under one parent, read as one prompt: its widest input, all of
                 its outputs and two copies of the hidden state at once, batch * context rows in the dtype the model
                 computes in (the output head sees one row a sequence, as in generation)
    workspace    what the kernel of one layer allocates (`workspace_bytes`), an upper bound

What Python, torch and a model's own code hold (interpreter and libraries, attention scores that are written out,
sums in float32) comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from bitfold import hf
from bitfold.activations import FLOAT, Activations
from bitfold.formats import parse
from bitfold.kv import blocks as kv
from bitfold.kv import store
from bitfold.layout import Source
from bitfold.qtensor import plan_linear
from bitfold.rules import ModuleInfo

_KV_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a number in a cache that isn't quantized
KV_FORMATS = (*_KV_BYTES, *kv.FORMATS)
"""Formats of the KV cache: what a model computes in, and bitfold.QuantizedCache's."""
_KV_OF_DTYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

DEFAULT_CONTEXT = 4096  # tokens, where the model itself can take so many


@dataclass(frozen=True)
class Run:
    """How the model is to run: tokens of a sequence, sequences at once, format of the KV cache, threads."""

    context: int
    batch: int
    kv_format: str
    threads: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Memory:
    """Bytes to run a model; see the head of this file. kv_cache: None where it can't be told."""

    weights: int
    repacked: int
    kv_cache: int | None
    activation: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.repacked + (self.kv_cache or 0) + self.activation + self.workspace


def run_of(source: Source, context: int | None = None, batch: int = 1, kv_format: str | None = None) -> Run:
    """The run that is meant, defaults filled in. Raises ValueError for what can't be."""
    for name, value in (("context", context), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    dtype = hf.config_dtype(source.config)
    if kv_format is not None and kv_format not in KV_FORMATS:
        raise ValueError(f"kv_format is {kv_format!r}; it must be one of {', '.join(KV_FORMATS)}")
    return Run(
        context=context or hf.context_up_to(source.model_config, DEFAULT_CONTEXT),
        batch=batch,
        kv_format=kv_format or _KV_OF_DTYPE.get(dtype, "fp32"),
        threads=torch.get_num_threads(),
        dtype=dtype,
    )


# No kernel repacks weights (QuantModule.prepare builds nothing).
REPACKED_BYTES = 0


def kv_cache(source: Source, run: Run) -> int | None:
    """Bytes of the KV cache; None where it can't be told, which `run_notes` says."""
    try:
        shape = hf.cache_shape(source.model_config)
    except ValueError:
        return None
    if run.kv_format in _KV_BYTES:
        return shape.numbers(run.context) * run.batch * _KV_BYTES[run.kv_format]
    return run.batch * shape.heads * quantized_cache(shape, run)


def quantized_cache(shape: hf.CacheShape, run: Run) -> int:
    """Bytes of a bitfold.QuantizedCache of default options for one head, over all layers: what it has allocated once a
    prompt of the context is in it."""
    group = kv.value_group_of(run.kv_format, shape.head_dim)
    blocks = kv.BlockFormat(run.kv_format, kv.DEFAULT_GROUP, shape.head_dim, group)
    return sum(
        store.nbytes_of(
            blocks, run.context if window is None else min(window - 1, run.context), run.dtype.itemsize
        )
        for window in shape.windows
    )


def activation(infos: Mapping[str, ModuleInfo], run: Run) -> int:
    """Bytes of the largest block's input and outputs: linear layers of one parent are one block. An estimate: what
    a model holds at once is its code's affair. Of experts it is one of them, to which all tokens may go."""
    hidden = max((info.shape[1] for info in infos.values() if info.kind == "embedding"), default=0)
    blocks: dict[str, list[ModuleInfo]] = {}
    for name, info in infos.items():
        if info.kind in ("linear", "experts"):
            blocks.setdefault(name if info.is_head else name.rpartition(".")[0], []).append(info)
    largest = 0
    for block in blocks.values():
        rows = run.batch * (1 if block[0].is_head else run.context)
        numbers = max(info.matrix[1] for info in block) + sum(info.matrix[0] for info in block) + 2 * hidden
        largest = max(largest, rows * numbers * run.dtype.itemsize)
    return largest


def workspace(format: str, info: ModuleInfo, run: Run, activations: Activations = FLOAT) -> int:
    """Bytes of workspace of one linear layer or expert, of a prompt and of a token at a time."""
    n, k = info.matrix
    rows = run.batch * (1 if info.is_head else run.context)
    # Both are run: the prompt at once, then a token at a time.
    return max(
        workspace_bytes(format, m, n, k, run.dtype, run.threads, activations) for m in (run.batch, rows)
    )


def workspace_bytes(
    format: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    threads: int,
    activations: Activations = FLOAT,
) -> int:
    """Upper bound of what the product of an [m, k] x and an [n, k] weight allocates on the CPU beside its result
    (csrc/cpu/linear*.cpp), with k rounded up to 256, the most columns that a kernel takes at once:

        fused   x in fp32 and partial sums of it (at most 8 rows), the fp32 results, and for each thread the scales
                of a few rows of the weight
        tiled   at most 512 rows of x in fp32 (and up to 7 that fill the last tile), and for each thread a strip of
                decoded weights with its sums, at most 96 rows of 1024 columns
        floor   x in float64, and for each thread a decoded row
        int8    of at most 256 rows of x (and some that fill a group) the codes, with "llm-int8" all columns in fp32
                too, for each of them may have an outlier; and for each thread a row of x in fp32 with its codes, and
                sums of x and 64 rows of the weight
        fp8     at most 512 rows of x, rounded, in x's dtype, for each thread a row of x in fp32 with its codes, and
                what the product of these rows with the weight takes

    Raises ValueError where the plan names a kernel that this formula doesn't know.
    """
    columns = 256 * math.ceil(k / 256)
    op = "linear" if parse(format).grid == "block" else activations.op
    if op == "linear_int8":
        return _int8_bytes(m, n, k, columns, dtype, threads, activations.kind == "llm-int8")
    if op == "linear_fp8":
        rows = min(m, 512)
        rounded = rows * (k * dtype.itemsize + 4) + threads * 5 * k
        return rounded + workspace_bytes(format, rows, n, k, dtype, threads)
    regime = plan_linear(format, m, n, k, dtype).regime
    if regime == "fused":
        return 4 * (10 * columns + k + m * n + n + threads * 16 * (k + 256))
    if regime == "tiled":
        rows = min(m, 512) + 7
        return 4 * (rows * columns + n + threads * (11 * columns + 96 * rows + 120 * 1024))
    if regime == "floor":
        return 8 * (m * k + n) + 4 * threads * k
    raise ValueError(f"the plan names the kernel {regime!r}; it must be fused, tiled or floor")


def _int8_bytes(
    m: int, n: int, k: int, columns: int, dtype: torch.dtype, threads: int, has_outliers: bool
) -> int:
    """Those of `linear_int8`; of float64 it is x in float64 again, its outliers and its codes."""
    if dtype == torch.float64:
        return m * 17 * k + 3 * k + 8 * n
    rows = min(m, 256)
    x = (max(rows, 8) + 16) * columns + rows * (4 + 4 * math.ceil(k / 65536))
    outliers = 4 * (rows * k + columns + threads * 1024) if has_outliers else 0
    return x + outliers + threads * (5 * columns + 64 * (12 * rows + 4 * 64 + 8))


def run_notes(source: Source, run: Run) -> Iterable[str]:
    """What must be said of the run, whatever the recipe."""
    try:
        hf.cache_shape(source.model_config)
    except ValueError as error:
        yield f"the KV cache is left out: {error}"
    longest = hf.longest_context(source.model_config)
    if longest is not None and run.context > longest:
        yield f"a context of {run.context} tokens is more than the model was made for, {longest}"
