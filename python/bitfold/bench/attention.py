"""Cases of the KV cache: one new token's attention to a long past, packed and in 16 bits.

One layer of Llama-3 8B: 32 query heads of 128 numbers, four of which share keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.bench.cases import Case, Rows, Timing, row_of, with_ceilings
from bitfold.bench.ceilings import Ceiling, rotate
from bitfold.bench.clock import CALLS_PER_TURN
from bitfold.bench.contestants import DTYPES
from bitfold.bench.validate import check_attention
from bitfold.kv.attention import attend
from bitfold.kv.blocks import DEFAULT_GROUP, FORMATS, BlockFormat, value_group_of
from bitfold.kv.store import DEFAULT_RESIDUAL, Store

HEADS, SHARED, HEAD = 8, 4, 128  # of keys and values; queries to each; numbers


@dataclass(frozen=True)
class Attender:
    """One that attends. kind: "bitfold" or "torch"; nbytes: of a past as it is read; past: the keys and values that it
    means, [1, heads, tokens, head]; copy: puts one more past into memory and returns query -> [1, 1, heads, head]."""

    name: str
    kind: str
    nbytes: int
    past: Callable[[], tuple[Tensor, Tensor]]
    copy: Callable[[], Callable[[Tensor], Tensor]]
    format: str | None = None


def kv_cases(
    tokens: list[int], dtypes: list[str], reader: Ceiling, timing: Timing
) -> Iterator[tuple[Case, Rows]]:
    """Every length of the past and every dtype; rows of (contestants, ceiling) for each case."""
    for count in tokens:
        for dtype in dtypes:
            # Keys with channels of their own mean and size, as models have them.
            keys = torch.randn(1, HEADS, count, HEAD) * torch.randn(HEAD).exp() + 2 * torch.randn(HEAD)
            values = torch.randn(1, HEADS, count, HEAD)
            query = (torch.randn(1, HEADS * SHARED, 1, HEAD) / 4).to(DTYPES[dtype])
            past = keys.to(DTYPES[dtype]), values.to(DTYPES[dtype])
            here = [
                _of_torch(f"torch {dtype}", past, as_rows=False),
                _of_torch(f"torch {dtype}, heads as rows", past, as_rows=True),
                *(_of_bitfold(format, past) for format in FORMATS),
            ]
            case = Case("kv", HEADS * SHARED, HEAD, count, dtype)
            calls = {one.name: rotate([one.copy() for _ in range(CALLS_PER_TURN)]) for one in here}
            errors = {
                one.name: check_attention(one.name, query, *one.past(), calls[one.name](query))
                for one in here
            }
            spreads = timing.spreads(
                {**{name: partial(call, query) for name, call in calls.items()}, reader.name: reader.run}
            )
            rows = [row_of(case, one, spreads) for one in here]
            for row, one in zip(rows, here, strict=True):
                row["error"] = errors[one.name]
                row["bytes"] = one.nbytes
            yield case, with_ceilings(rows, spreads, [reader], f"torch {dtype}")


def _of_torch(name: str, past: tuple[Tensor, Tensor], *, as_rows: bool) -> Attender:
    """torch's scaled_dot_product_attention. as_rows: queries that share keys are given to it as rows of one head, which
    is the same for a new token alone and spares it the question what heads share."""

    def copy() -> Callable[[Tensor], Tensor]:
        keys, values = (tensor.clone() for tensor in past)

        def run(query: Tensor) -> Tensor:
            rows = query.reshape(1, HEADS, SHARED, HEAD) if as_rows else query
            out = F.scaled_dot_product_attention(rows, keys, values, enable_gqa=not as_rows)
            return out.reshape(1, 1, HEADS * SHARED, HEAD)

        return run

    return Attender(name, "torch", sum(tensor.nbytes for tensor in past), lambda: past, copy)


def _of_bitfold(format: str, past: tuple[Tensor, Tensor]) -> Attender:
    law = BlockFormat(format, DEFAULT_GROUP, HEAD, value_group_of(format, HEAD))

    def store() -> Store:
        own = Store.like(law, DEFAULT_RESIDUAL, past[0])
        own.append_prompt(*past)
        return own

    first = store()
    nbytes = HEADS * first.packed * law.nbytes + sum(tensor.nbytes for tensor in first.exact())

    def copy() -> Callable[[Tensor], Tensor]:
        own = store()
        return lambda query: attend(query, own, own.tokens, None, HEAD**-0.5)

    return Attender(f"kv {format}", "bitfold", nbytes, first.decode, copy, format)
