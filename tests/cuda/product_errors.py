"""How far products on a GPU are from float64 of the decoded weights, as the emulator computes them.

    PYTHONPATH=tests:tests/cuda python tests/cuda/product_errors.py > bench/results/cuda-errors-emulated.txt

Norms of errors over norms of results: normal W of 96 x 2048, normal x, or its magnitudes, by the kernels for few rows
(4), for 9 to 32 (16) and with wgmma (64). The rounding of y is part of it: 2.0e-4 in fp16, 1.6e-3 in bf16.
"""

from __future__ import annotations

import bitfold
import devices
import torch

FORMATS = (
    *("int8-channel", "int4-g128", "int4-g128-asym", "int4-g32", "int3-g64", "int2-g64"),
    *("nf4-b64", "nf4-b64-dq", "fp4-b64", "fp8-e4m3-channel"),
    *("q4_0", "q4_1", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4"),
)  # fmt: skip
ROWS = (4, 16, 64)
N, K = 96, 2048


def relative_error(x: torch.Tensor, qtensor: bitfold.QTensor) -> float:
    exact = x.double() @ qtensor.decode().double().T
    with devices.use("emulated"):
        y = bitfold.linear(x, qtensor)
    return float((y.double() - exact).norm() / exact.norm())


def main() -> None:
    cases = [(dtype, sign) for dtype in (torch.float16, torch.bfloat16) for sign in ("normal", "one sign")]
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    heads = [f"{names[dtype]} {sign}, {m}" for dtype, sign in cases for m in ROWS]
    print("| format | " + " | ".join(heads) + " |")
    print("| --- |" + " --- |" * len(heads))
    for format in FORMATS:
        generator = torch.Generator().manual_seed(0)
        qtensor = bitfold.encode(torch.randn(N, K, generator=generator), format)
        cells = []
        for dtype, sign in cases:
            for m in ROWS:
                x = torch.randn(m, K, generator=generator).to(dtype)
                cells.append(f"{relative_error(x if sign == 'normal' else x.abs(), qtensor):.2e}")
        print(f"| {format} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
