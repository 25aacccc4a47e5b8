"""llama.cpp as the peer of GGUF's block formats: one encoder and decoder for each type, and its products.

A product is named after the place where the library keeps the matrix: as the blocks lie in a file, or repacked for
its kernels. All of them take fp32 activations and round them to 8 bits, as llama.cpp runs a model. The library's
pool has as many threads as torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bitfold
from bitfold.bench import ggml
from bitfold.bench.contestants import DTYPES, Coder, Multiplier, Peer, importance
from bitfold.formats import parse

LIBRARY = "llama.cpp"
PLACES = {"CPU": "", "CPU_REPACK": " repacked"}  # name of a buffer type: what a contestant's name says of it
# Each block's activations are rounded to 127 steps of their largest; 7e-3 was seen for gaussian ones.
TOLERANCE = dict.fromkeys(DTYPES, 2e-2)


def _blocks_need(type: str) -> Callable[[int, int], str | None]:
    def needs(n: int, k: int) -> str | None:
        values = parse(type).group
        return f"k must be a multiple of {values}" if k % values else None

    return needs


def _product_needs(type: str, place: str) -> Callable[[int, int], str | None]:
    def needs(n: int, k: int) -> str | None:
        why = _blocks_need(type)(n, k)
        if why is None:
            try:
                ggml.Matrix(type, n, k, torch.get_num_threads(), place)
            except ValueError as error:
                why = str(error)
        return why

    return needs


def _linear(type: str, place: str) -> Callable[[Tensor], Multiplier]:
    def make(weight: Tensor) -> Multiplier:
        n, k = weight.shape
        # Its own encoders take seconds for a matrix; that bitfold's bytes are theirs is for `encode` to check.
        blocks = bitfold.encode(weight, type).planes["blocks"]

        def copy() -> Callable[[Tensor], Tensor]:
            matrix = ggml.Matrix(type, n, k, torch.get_num_threads(), place)
            matrix.fill(blocks)
            return matrix

        return Multiplier(
            f"llama.cpp {type}{PLACES[place]}",
            "peer",
            blocks.nbytes,
            tuple(DTYPES),
            lambda: ggml.library().dequantize(blocks, type, k).double(),
            copy,
            TOLERANCE,
            takes="fp32",
            format=type,
        )

    return make


def _coder(type: str, important: bool) -> Callable[[], Coder]:
    def make() -> Coder:
        library, values = ggml.library(), ggml.library().row_bytes(type, parse(type).group)

        def encode(weight: Tensor) -> Tensor:
            vector = importance(weight.shape[1]) if important else None
            return library.quantize(weight.float().contiguous(), type, vector)

        def decode(blocks: Tensor, dtype: torch.dtype) -> Tensor:
            assert dtype == torch.float32  # the case's dtypes say so
            return library.dequantize(blocks, type, blocks.shape[1] // values * parse(type).group)

        return Coder(
            f"llama.cpp {type}",
            "peer",
            parse(type).bits,
            encode,
            decode,
            torch.clone,
            lambda blocks: blocks.nbytes,
            type,
            lambda blocks: blocks,
            ("fp32",),
        )

    return make


def _peers(type: str) -> list[Peer]:
    coder = Peer(
        f"llama.cpp {type}",
        LIBRARY,
        _blocks_need(type),
        linear=_linear(type, "CPU"),
        coder=_coder(type, important=False),
        important=_coder(type, important=True),
        beside=type,
    )
    others = [
        Peer(
            f"llama.cpp {type}{suffix}",
            LIBRARY,
            _product_needs(type, place),
            linear=_linear(type, place),
            beside=type,
        )
        for place, suffix in PLACES.items()
        if suffix
    ]
    return [coder, *others]


PEERS = tuple(peer for type in ggml.BLOCK_TYPES for peer in _peers(type))
