"""Inputs for the kernels of the packed KV cache, and what should come out: kernel_cases.KvCase has the shapes."""

from __future__ import annotations

import numpy as np
import oracle_kv
import torch
from bitfold.kv.blocks import BlockFormat
from cases import DTYPES, bits


def contents(case, rng: np.random.Generator) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    dtype, tokens = DTYPES[case.dtype], case.n + case.recent
    law = BlockFormat(case.format, case.group, case.k, case.value_group or case.k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    keys, values = (normal(case.batch, case.heads, tokens, case.k) for _ in range(2))
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
    query = normal(case.batch, case.heads * case.shared, case.m, case.k)
    seen = tokens - case.first
    masks = {
        "": None,
        "bool": torch.from_numpy(rng.uniform(size=(case.batch, 1, case.m, seen)) < 0.6),
        "float": normal(case.batch, 1, case.m, seen),
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
