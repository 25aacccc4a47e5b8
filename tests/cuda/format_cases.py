"""Inputs for the kernels that encode, decode, pack and unpack, and the CPU's bits."""

from __future__ import annotations

import bitfold
import numpy as np
import torch
from case_file import PLANES, Case, Contents, matrix, qtensor
from cases import DTYPES, bits, block_formats, columns, oracle_planes, weights

DECODE = [
    *(Case("decode", format, 7, columns(format), m, dtype) for format in (*PLANES, *block_formats(), "fp16", "bf16")
      for m, dtype in ((0, "fp32"), (4, "fp16"), (9, "bf16"))),
    *(Case("decode", format, 6, 256, 0, "bf16") for format in PLANES),  # whole runs of eight
    *(Case("decode", format, 5, 4352, m, "bf16") for format in ("nf4-b64-dq", "int4-g128-asym") for m in (0, 3)),
    *(Case("decode", format, 5, 1792, 0, "fp16") for format in ("int8-channel", "q4_k", "q4_0")),
    Case("decode", "int3-g64-asym", 6, 256, 0, "bf16"),
    *(Case("decode", format, 5, 35, 0, "fp32", layout="flat") for format in ("nf4-b64-dq", "fp4-b33")),
]  # fmt: skip
ENCODE = [
    Case("encode", format, 5, columns(format), 5, "fp32")
    for format in (*PLANES, "int4-g17-asym", "int8-tensor-asym", "nf4-b64-dq", "fp16", *block_formats())
] + [Case("encode", format, 5, 512, 5, "fp32", importance=True) for format in block_formats()]  # fmt: skip
PACK = [
    Case("pack", format, 5, 83)
    for format in ("int8-channel-asym", "int4-g32-asym", "int3-g17-asym", "int2-g64", "nf4-b64")
]


def decode(case: Case, rng: np.random.Generator) -> Contents:
    q = qtensor(case, rng)
    decoded, tensors = q.decode(DTYPES[case.dtype]), oracle_planes(q)
    if case.m:
        ids = torch.from_numpy(rng.integers(0, case.n, case.m))
        tensors["ids"] = ids.numpy()
        decoded = decoded[ids]
    return {"rows": len(decoded)}, tensors | {"expected out": bits(decoded)}


def encode(case: Case, rng: np.random.Generator) -> Contents:
    source = torch.from_numpy(weights(rng, case.n, case.k))
    importance = torch.linspace(0, 1, case.k) if case.importance else None
    planes = bitfold.encode(source, case.format, importance=importance).planes
    expected = {f"expected out {name}": bits(plane) for name, plane in planes.items()}
    given = {} if importance is None else {"importance": importance.numpy()}
    return matrix(source), {"w": source.numpy(), **given, **expected}


def pack(case: Case, rng: np.random.Generator) -> Contents:
    q = qtensor(case, rng)
    codes, _, zeros, *_ = q.unpack()
    values = {"packed_bytes": q.planes["codes"].nbytes, "packed_zeros_bytes": 0}
    tensors = {
        "codes": codes.numpy(),
        "expected out codes": bits(q.planes["codes"]),
        "expected out logical codes": codes.numpy(),
    }
    if zeros is not None:
        tensors |= {"zeros": zeros.numpy(), "expected out zeros": bits(q.planes["zeros"])}
        values |= {"packed_zeros_bytes": q.planes["zeros"].nbytes}
    return values, tensors
