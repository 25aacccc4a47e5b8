"""A few small products and conversions on the GPU, for compute-sanitizer: ragged sizes, every regime."""

import bitfold
import torch

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
torch.cuda.synchronize()
print("all right")
