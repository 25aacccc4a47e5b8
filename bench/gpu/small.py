"""A few small products and conversions on the GPU, for compute-sanitizer: ragged sizes, every regime."""

import bitfold
import torch
from bitfold.kv.attention import attend
from bitfold.kv.blocks import FORMATS, BlockFormat
from bitfold.kv.store import Store

torch.manual_seed(0)
for format in ("int4-g128", "int3-g17", "nf4-b64-dq", "fp8-e4m3", "q4_k", "q6_k"):
    n, k = 37, 512 if bitfold.formats.parse(format).grid == "block" else 301
    weight = torch.randn(n, k)
    qtensor = bitfold.encode(weight.cuda(), format)
    exact = bitfold.encode(weight, format).decode(torch.float64)
    assert torch.equal(qtensor.decode(torch.float64).cpu(), exact), format
    for m in (1, 5, 17, 130):
        x = torch.randn(m, k).half()
        y = bitfold.linear(x.cuda(), qtensor).cpu().double()
        expected = x.double() @ exact.T
        error = float((y - expected).norm() / expected.norm())
        assert error < 2e-3, f"{format} m={m}: {error}"

planes = list(bitfold.encode(torch.randn(37, 304).cuda(), "int8").planes.values())
for m in (1, 9, 70):
    x = torch.randn(m, 304)
    x[:, 17] *= 30
    arguments = ("int8", 37, 304, None, 6.0)
    y = torch.ops.bitfold.linear_int8(x.cuda(), planes, *arguments).cpu()
    assert torch.equal(y, torch.ops.bitfold.linear_int8(x, [plane.cpu() for plane in planes], *arguments)), m

for format in FORMATS:
    law = BlockFormat(format, 16, 20, 20)
    store = Store.like(law, 5, torch.empty(1, 2, 1, 20, device="cuda"))
    store.append_prompt(torch.randn(1, 2, 150, 20).cuda(), torch.randn(1, 2, 150, 20).cuda())
    y = attend(torch.randn(1, 6, 1, 20).cuda(), store, store.tokens, None, 0.2)
    assert torch.isfinite(y).all(), format

x = torch.randn(5, 77)
found = torch.ops.bitfold.round_fp8(x.cuda()), torch.ops.bitfold.round_fp8(x)
assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(*found, strict=True))
torch.cuda.synchronize()
print("all right")
