"""A run: the grid of cases that its settings ask for, and the report that is written as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.bench import ggml, gpu, llama
from bitfold.bench.attention import kv_cases
from bitfold.bench.bars import BARS, BLOCK_BARS, GPU_BARS, Bar, verdicts
from bitfold.bench.cases import Case, Rows, Timing, decode_cases, encode_cases, linear_cases
from bitfold.bench.ceilings import Ceiling, fastest_reader, rotation_bytes
from bitfold.bench.clock import MIN_ROUNDS
from bitfold.bench.contestants import (
    DTYPES,
    Multiplier,
    Peer,
    bitfold_coder,
    bitfold_multiplier,
    torch_multiplier,
    with_outliers,
)
from bitfold.bench.imports import import_rows
from bitfold.bench.machine import machine, versions
from bitfold.bench.peers import LIBRARIES, PEERS, absence
from bitfold.formats import parse
from bitfold.outfile import Kind

SCHEMA = 1
RESULTS = Kind("result of 'bitfold bench'", re.compile(r"\{\s*\"schema\": \d+,\s*\"machine\": \{"))
OPS = ("linear", "encode", "decode", "importance", "import")
MORE_OPS = ("int8", "kv")  # that a run has only where they are named
FORMATS = (
    "int8",
    "int4-g128",
    "int4-g128-asym",
    "nf4",
    "nf4-dq",
    "fp4",
    "fp8",
    "int3-g64",
    "int2-g64",
)
SEARCHLESS = ("q8_0", "mxfp4")  # of the block formats: nothing for importance to weigh


@dataclass(frozen=True)
class Settings:
    """What a run measures. seconds: for each case, which takes `min_rounds` rounds at least.

    tokens: that kv attends to; peers: libraries of peers.LIBRARIES; rotation: bytes between two uses of a matrix, 0 for
    those of `rotation_bytes`; device: "cpu" or "cuda", the current GPU. Raises ValueError for an unknown op, format,
    dtype, peer or device, or a size below 1.
    """

    ops: tuple[str, ...] = OPS
    formats: tuple[str, ...] = FORMATS
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096))
    batches: tuple[int, ...] = (1, 8, 32, 128, 1024)
    tokens: tuple[int, ...] = (4096, 32768)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    peers: tuple[str, ...] = LIBRARIES
    threads: int = 0
    seconds: float = 6.0
    min_rounds: int = MIN_ROUNDS
    rotation: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("ops", self.ops, (*OPS, *MORE_OPS)),
            ("dtypes", self.dtypes, tuple(DTYPES)),
            ("peers", self.peers, LIBRARIES),
            ("device", (self.device,), ("cpu", "cuda")),
        ):
            for value in values:
                if value not in allowed:
                    raise ValueError(f"{name} names {value!r}; it must name some of {', '.join(allowed)}")
        for format in self.formats:
            parse(format)
        for name, sizes, least in (
            ("batches", self.batches, 1),
            ("tokens", self.tokens, 1),
            ("shapes", tuple(size for shape in self.shapes for size in shape), 1),
            ("min_rounds", (self.min_rounds,), 1),
            ("threads", (self.threads,), 0),
            ("seconds", (self.seconds,), 0),
            ("rotation", (self.rotation,), 0),
        ):
            if min(sizes, default=least) < least:
                raise ValueError(f"{name} is or holds {min(sizes)}; it must be at least {least}")


Progress = Callable[[Case, Rows], None]


def run(settings: Settings, on_case: Progress = lambda case, rows: None) -> dict[str, Any]:
    """All cases of the settings; on_case is told each when it is done.

    Returns the report (docs/benchmarks.md): schema, machine, versions, absent, settings, ceilings, rows,
    bars. Sets torch's number of threads. Raises WrongResultError where a contestant computes wrongly.
    """
    on_gpu = settings.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; this torch sees no GPU")
    facts = machine()  # before the run is a load itself
    threads = settings.threads or torch.get_num_threads()
    absent = {library: reason for library in settings.peers if (reason := absence(library, threads))}
    torch.set_num_threads(threads)  # after the peers' imports, which may set it
    torch.manual_seed(0)
    rotation = settings.rotation or (gpu.rotation_bytes() if on_gpu else rotation_bytes())
    rows: Rows = []
    with torch.inference_mode(), torch.device(settings.device):
        brief = min(1.0, settings.seconds)
        if on_gpu:
            facts["gpu"] = gpu.gpu()
            reader, copy = gpu.copy_ceiling(rotation, brief)
            ceilings = {"copy": copy}
        else:
            reader, ceilings = _ceilings(rotation, threads, brief)
        timing = Timing(threads, settings.seconds, settings.min_rounds, settings.device)
        formats = {parse(format).canonical for format in settings.formats}
        peers = [
            peer
            for peer in PEERS
            if peer.library in settings.peers
            and peer.library not in absent
            and settings.device in peer.devices
            and (peer.beside is None or peer.beside in formats)
            and (peer.coder is not None or "linear" in settings.ops)
        ]
        refused: list[dict[str, Any]] = []
        for n, k in settings.shapes:
            fitting = _fitting(peers, n, k, refused)
            for op in settings.ops:
                for case, found in _cases(op, n, k, fitting, settings, reader, timing):
                    rows += found
                    on_case(case, found)
        if "kv" in settings.ops:
            for case, found in kv_cases(list(settings.tokens), list(settings.dtypes), reader, timing):
                rows += found
                on_case(case, found)
    if "import" in settings.ops:
        found = import_rows()
        rows += found
        on_case(Case("import", 0, 0, None, ""), found)
    absence_of_llama = llama.LIBRARY in absent or llama.LIBRARY not in settings.peers
    return {
        "schema": SCHEMA,
        "machine": facts,
        "versions": {**versions(), **({} if absence_of_llama else {llama.LIBRARY: ggml.library().version})},
        "absent": absent,
        "refused": refused,
        "settings": {**asdict(settings), "threads": threads, "rotation": rotation},
        "ceilings": ceilings,
        "rows": rows,
        "bars": verdicts(rows, _bars(settings)),
    }


def _blocks(formats: tuple[str, ...]) -> list[str]:
    return [format for format in formats if parse(format).grid == "block"]


def _bars(settings: Settings) -> list[Bar]:
    """Those of the device, and of the formats that the run has: of GGUF's blocks, of the others, or of both."""
    if settings.device == "cuda":
        return [bar for bar in GPU_BARS if bar.op in settings.ops]
    blocks = len(_blocks(settings.formats))
    return [*(BARS if blocks < len(settings.formats) else ()), *(BLOCK_BARS if blocks else ())]


def _ceilings(rotation: int, threads: int, seconds: float) -> tuple[Ceiling, dict[str, Any]]:
    """The read ceiling of the cases, and what was measured with one thread and with all."""
    facts = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        best, facts[f"read, {count} thread{'s' if count > 1 else ''}"] = fastest_reader(
            rotation, count, seconds
        )
    return Ceiling("read", best.run, best.nbytes), facts


def _fitting(peers: list[Peer], n: int, k: int, refused: list[dict[str, Any]]) -> list[Peer]:
    """The peers that take an n x k matrix; the others are noted in `refused`."""
    reasons = {peer.name: peer.needs(n, k) for peer in peers}
    refused += [{"peer": name, "n": n, "k": k, "why": why} for name, why in reasons.items() if why]
    return [peer for peer in peers if reasons[peer.name] is None]


def _cases(
    op: str, n: int, k: int, peers: list[Peer], settings: Settings, reader: Ceiling, timing: Timing
) -> Any:
    dtypes = list(settings.dtypes)
    if op == "linear":
        whole = _blocks(settings.formats) if settings.device == "cpu" else []  # products of 8-bit numbers
        makers: list[Callable[[Tensor], Multiplier]] = [
            *(lambda w, d=dtype: torch_multiplier(w, d) for dtype in dtypes),
            *(lambda w, f=format: bitfold_multiplier(w, f) for format in settings.formats),
            *(lambda w, f=format: bitfold_multiplier(w, f, "int8") for format in whole),
            *(peer.linear for peer in peers if peer.linear is not None),
        ]
        return linear_cases(n, k, makers, list(settings.batches), dtypes, reader, timing)
    if op == "int8":
        makers = [
            *(lambda w, d=dtype: torch_multiplier(w, d) for dtype in dtypes),
            lambda w: bitfold_multiplier(w, "int8", "llm-int8"),
        ]
        return linear_cases(n, k, makers, list(settings.batches), dtypes, reader, timing, op, with_outliers)
    if op == "importance":
        searching = [format for format in _blocks(settings.formats) if format not in SEARCHLESS]
        coders = [bitfold_coder(format, important=True) for format in searching]
        coders += [peer.important() for peer in peers if peer.important and peer.beside in searching]
        return encode_cases(n, k, coders, dtypes, reader, timing, op) if coders else ()
    coders = [bitfold_coder(format) for format in settings.formats]
    coders += [peer.coder() for peer in peers if peer.coder is not None]
    if op == "encode":
        return encode_cases(n, k, coders, dtypes, reader, timing)
    if op == "decode":
        return decode_cases(n, k, coders, dtypes, reader, timing)
    return ()
