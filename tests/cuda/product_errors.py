"""How far products on a GPU are from float64 of the decoded weights, as the emulator computes them.

    PYTHONPATH=tests:tests/cuda python tests/cuda/product_errors.py > bench/results/cuda-errors-emulated.txt

Norms of errors over norms of results: normal W of 96 x 2048, and x as KINDS has it, by the kernels for few rows (4),
for 9 to 32 (16) and with wgmma (64) of GPUs of compute capability 9.0, and by those of 8.0. The rounding of y is part
of it: 2.0e-4 in fp16, 1.6e-3 in bf16.
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
CAPABILITIES = (90, 80)


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """Four columns are 300 times as large: beside them tensor cores cut off most."""
    columns = torch.arange(len(x[0]), device=x.device) % (len(x[0]) // 4) == 5
    return torch.where(columns, 300 * x, x)


KINDS = {"normal": lambda x: x, "one sign": torch.abs, "outliers": with_outliers}


def relative_error(x: torch.Tensor, qtensor: bitfold.QTensor, capability: int = 90) -> float:
    exact = x.double() @ qtensor.decode().double().T
    with devices.use("emulated"):
        devices.emulated().configure(**devices.schedule(""), capability=capability)
        y = bitfold.linear(x, qtensor)
    return float((y.double() - exact).norm() / exact.norm())


def print_table(capability: int) -> None:
    cases = [(dtype, kind) for dtype in (torch.float16, torch.bfloat16) for kind in KINDS]
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    heads = [f"{names[dtype]} {kind}, {m}" for dtype, kind in cases for m in ROWS]
    print(f"Compute capability {capability / 10}:\n\n| format | " + " | ".join(heads) + " |")
    print("| --- |" + " --- |" * len(heads))
    for format in FORMATS:
        generator = torch.Generator().manual_seed(0)
        qtensor = bitfold.encode(torch.randn(N, K, generator=generator), format)
        cells = []
        for dtype, kind in cases:
            for m in ROWS:
                x = KINDS[kind](torch.randn(m, K, generator=generator).to(dtype))
                cells.append(f"{relative_error(x, qtensor, capability):.2e}")
        print(f"| {format} | " + " | ".join(cells) + " |", flush=True)
    print()


def main() -> None:
    for capability in CAPABILITIES:
        print_table(capability)


if __name__ == "__main__":
    main()
