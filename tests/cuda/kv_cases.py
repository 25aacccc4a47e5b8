"""Inputs for the kernels of the packed KV cache, and what should come out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle_kv
import torch
from bitfold.kv.blocks import BlockFormat
from case_file import Case, Contents, normal
from cases import DTYPES, bits


@dataclass(frozen=True)
class KvCase(Case):
    """n: packed tokens; k: the head size; m: rows of queries."""

    batch: int = 2
    heads: int = 2
    shared: int = 2  # query heads of a key-value head
    group: int = 16
    value_group: int = 0  # 0: the head size
    first: int = 0
    recent: int = 0
    mask: str = ""
    page: int = 3  # blocks

    def __str__(self) -> str:
        numbers = (self.heads, self.shared, self.group, self.value_group, self.first, self.recent, self.page)
        return "-".join([super().__str__(), *map(str, numbers), self.mask])


PACK = [
    KvCase("kv_pack", format, 48, k, 0, dtype, group=group, value_group=value_group)
    for format in ("int8", "fp8", "int4")
    for k, value_group, group, dtype in ((7, 0, 16, "fp32"), (160, 32, 48, "bf16"), (300, 0, 16, "fp16"))
]
UNPACK = [
    *(KvCase("kv_unpack", format, n, k, 0, dtype, group=group, value_group=value_group, first=first, recent=recent)
      for format in ("int8", "fp8", "int4")
      for n, k, value_group, group, first, recent, dtype in (
          (96, 7, 0, 16, 21, 5, "fp32"),
          (240, 160, 32, 80, 1, 3, "bf16"),  # tiles of tokens and of channels, and a part of one each
          (128, 72, 0, 64, 64, 0, "fp16"),
          (32, 65, 0, 16, 7, 2, "fp16"),
      )),
    KvCase("kv_unpack", "int8", 16 * 100, 16, 0, "bf16", batch=1, first=20, recent=1, page=1),  # two launches
    KvCase("kv_unpack", "fp8", 32, 20, 0, "bf16", first=3, recent=3),  # copied by fours
    KvCase("kv_unpack", "int4", 16, 3, 0, "fp16", first=16, recent=9),
]  # fmt: skip
ATTENTION = [
    *(KvCase("kv_attention", format, 96, 7, 3, group=16, shared=3, first=21, recent=70, mask="bool")
      for format in ("int8", "fp8", "int4")),
    # one query of an odd head
    *(KvCase("kv_attention", format, 32, 7, 1, shared=1, recent=3) for format in ("int8", "fp8", "int4")),
    KvCase("kv_attention", "int8", 64, 1101, 2, batch=1, heads=1, recent=3),  # a slice more, a query at a time
    KvCase("kv_attention", "int8", 33 * 256, 16, 2, batch=1, heads=1, shared=1, group=256, recent=300, page=2),
    KvCase("kv_attention", "int4", 16 * 100, 16, 1, batch=1, shared=1, page=1, mask="float"),  # two launches
    KvCase("kv_attention", "int8", 16, 48, 5, recent=0, first=16, mask="float"),
    KvCase("kv_attention", "int8", 0, 16, 1),  # nothing
    KvCase("kv_attention", "int8", 16, 16, 1, "bf16", batch=1, heads=1, shared=1, recent=2100),  # chunks: 132
    *(KvCase("kv_attention", format, 64 * 19, k, 2, dtype, shared=3, group=64, value_group=64, first=100, recent=20,
             mask="float", page=2, multiprocessors=1)  # several turns of a warp
      for format, k, dtype in (("int8", 128, "fp16"), ("fp8", 64, "fp32"), ("int4", 128, "bf16"))),
    KvCase("kv_attention", "int8", 64 * 6, 128, 1, "fp32", heads=1, shared=1, group=64),
    KvCase("kv_attention", "fp8", 64, 128, 3, "bf16", shared=2, group=64, first=3, recent=75, mask="float"),
    KvCase("kv_attention", "int4", 0, 64, 2, "fp16", heads=1, shared=3, group=64, recent=70, mask="bool",
           multiprocessors=1),  # no room for many chunks of exact tokens
    KvCase("kv_attention", "int8", 64 * 99, 64, 1, "bf16", batch=1, heads=1, shared=2, group=64, recent=5, page=1),
    *(KvCase("kv_attention", format, 576, 160, 2, "bf16", group=32, value_group=32, first=1, recent=40, mask="float")
      for format in ("int8", "fp8", "int4")),
]  # fmt: skip


def contents(case: KvCase, rng: np.random.Generator) -> Contents:
    dtype, tokens = DTYPES[case.dtype], case.n + case.recent
    law = BlockFormat(case.format, case.group, case.k, case.value_group or case.k)
    keys, values = (normal(case, rng, case.batch, case.heads, tokens, case.k) for _ in range(2))
    old = [x[:, :, : case.n].contiguous() for x in (keys, values)]
    packed = law.pack(*old)
    numbers: dict[str, object] = {
        "batch": case.batch,
        "heads": case.heads,
        "group": case.group,
        "value_group": law.value_group,
        "block_bytes": law.nbytes,
    }
    if case.op == "kv_pack":
        tensors = {"keys": old[0], "values": old[1], "expected out": packed}
        return numbers, {name: bits(tensor) for name, tensor in tensors.items()}
    exact = [x[:, :, case.n :].contiguous() for x in (keys, values)]
    pages = packed.split(case.page, 2) if case.n else ()
    numbers |= {"first": case.first, "recent": case.recent, "pages": len(pages)}
    tensors = {"keys": exact[0], "values": exact[1]}
    tensors |= {f"page{i}": page.contiguous() for i, page in enumerate(pages)}
    if case.op == "kv_unpack":
        for name, a, b in zip(("keys", "values"), law.unpack_anywhere(packed, dtype), exact, strict=True):
            tensors[f"expected out {name}"] = torch.cat([a[:, :, case.first :], b], 2)
        return numbers, {name: bits(tensor) for name, tensor in tensors.items()}
    query = normal(case, rng, case.batch, case.heads * case.shared, case.m, case.k)
    seen = tokens - case.first
    masks = {
        "": None,
        "bool": torch.from_numpy(rng.uniform(size=(case.batch, 1, case.m, seen)) < 0.6),
        "float": normal(case, rng, case.batch, 1, case.m, seen),
    }
    mask, scale = masks[case.mask], case.k**-0.5
    whole = [
        torch.cat([a, b.float()], 2)[:, :, case.first :]
        for a, b in zip(law.unpack_anywhere(packed, torch.float32), exact, strict=True)
    ]
    y = oracle_kv.attention(query, *whole, mask, scale)
    numbers |= {"query_heads": query.shape[1], "rows": case.m, "mask": ["", "bool", "float"].index(case.mask)}
    tensors |= {"query": query} | ({} if mask is None else {"mask": mask})
    arrays = {name: bits(tensor) for name, tensor in tensors.items()}
    near = np.abs(y) * torch.finfo(dtype).eps + 2e-6 * np.abs(whole[1].numpy()).max(initial=0)
    return numbers, arrays | {"scale": np.float32([scale]), "expected y": y, "tolerance": near}
