"""What only a GPU can show: streams, graphs, devices, sizes beyond 32 bits, arrays of other libraries."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import bitfold
import pytest
import torch
from bitfold.kv.attention import attend
from bitfold.kv.blocks import FORMATS as KV_FORMATS
from bitfold.kv.blocks import BlockFormat, value_group_of
from bitfold.kv.store import Store
from bitfold.quantizers import gptq
from cases import refusal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

FORMATS = ["int4-g128", "nf4-b64", "q4_k", "fp8-e4m3", "bf16"]
BATCHES = (1, 16, 300)  # one for each regime


def quantized(format: str, n: int = 512, k: int = 1024) -> bitfold.QTensor:
    return bitfold.encode(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), format).to("cuda")


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def test_the_current_stream_is_torch_s():
    assert bitfold._C.current_stream(0) == torch.cuda.current_stream().cuda_stream
    with torch.cuda.stream(torch.cuda.Stream()):
        assert bitfold._C.current_stream(0) == torch.cuda.current_stream().cuda_stream != 0


@pytest.mark.parametrize("format", FORMATS)
def test_work_is_queued_on_the_current_stream(format):
    """Behind a long kernel and a copy on a side stream; on any other stream it would see zeros."""
    qtensor, ids = quantized(format), torch.arange(7, device="cuda")
    expected_rows = bitfold.embedding(ids, qtensor)
    for m in BATCHES:
        real = draw(m, 1024)
        expected = bitfold.linear(real, qtensor)
        x, index = torch.zeros_like(real), torch.zeros_like(ids)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            x.copy_(real)
            index.copy_(ids)
            y, rows = bitfold.linear(x, qtensor), bitfold.embedding(index, qtensor)
        side.synchronize()
        assert torch.equal(y, expected), f"{format} m={m}"
        assert torch.equal(rows, expected_rows)


def test_threads_of_the_host_don_t_disturb_each_other():
    """The same kernels at once, with as much shared memory as each needs."""
    qtensor, int8 = quantized("int4-g128"), list(quantized("int8-channel").planes.values())
    torch.cuda.synchronize()

    def products(x: torch.Tensor) -> list[torch.Tensor]:
        return [
            bitfold.linear(x, qtensor),
            torch.ops.bitfold.linear_int8(x, int8, "int8-channel", 512, 1024),
        ]

    def work(m: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            x = draw(m, 1024)
            expected = products(x)
            for _ in range(300):
                for y, first in zip(products(x), expected, strict=True):
                    assert torch.equal(y, first), f"m={m}"

    batches = (1, 8, 16, 32, 48, 100, 300)
    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(work, batches))


@pytest.mark.parametrize("format", FORMATS)
def test_a_graph_captures_it(format):
    qtensor = quantized(format)
    layer = bitfold.QuantLinear(qtensor, torch.randn(512).bfloat16().cuda())
    for m in BATCHES:
        x, ids = draw(m, 1024), torch.arange(5, device="cuda")
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm), torch.no_grad():
            layer(x)
        warm.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = layer(x)
            decoded = qtensor.decode(torch.float16)
            rows = bitfold.embedding(ids, qtensor)
        for seed in range(2):
            torch.manual_seed(seed)
            x.copy_(draw(m, 1024))
            ids.copy_(torch.randint(0, 512, (5,)))
            graph.replay()
            with torch.no_grad():
                assert torch.equal(y, layer(x)), f"{format} m={m}"
            assert torch.equal(decoded, qtensor.decode(torch.float16))
            assert torch.equal(rows, bitfold.embedding(ids, qtensor))


@pytest.mark.parametrize("m", [1, 8, 16, 64])
@pytest.mark.parametrize("format", ["int4-g128", "nf4-b64-dq", "q4_k", "int4-g16"])
def test_a_kernel_that_begins_early_waits_for_the_last(format, m):
    """x, W and the memory of y are another kernel's until just before: without a pause, in a graph, and with one."""
    columns = 2048
    weights = [quantized(format, columns, columns * wide) for wide in (1, 1, 8)]
    each = 144 if format == "q4_k" else 1  # blocks in another order, not their bytes
    others = [
        [torch.randperm(plane.numel() // each, device="cuda") for plane in w.planes.values()] for w in weights
    ]
    start = draw(m, columns)

    def change(w: bitfold.QTensor, orders: list[torch.Tensor]) -> None:
        for plane, order in zip(w.planes.values(), orders, strict=True):
            plane.copy_(plane.reshape(len(order), -1)[order].reshape(plane.shape))

    def steps(pause) -> torch.Tensor:
        x = start
        for step in range(12):
            for w, orders in zip(weights, others, strict=True):
                pause()
                if step % 3 == 2:
                    change(w, orders)
                    pause()
                x = bitfold.linear(x.repeat(1, w.shape[1] // columns), w)
            pause()
            x = x / x.float().square().mean().sqrt().to(x.dtype)
        return x

    def afresh(run) -> torch.Tensor:
        copies = [[plane.clone() for plane in w.planes.values()] for w in weights]
        y = run()
        for w, planes in zip(weights, copies, strict=True):
            for plane, copy in zip(w.planes.values(), planes, strict=True):
                plane.copy_(copy)
        return y.clone()

    expected = afresh(lambda: steps(torch.cuda.synchronize))
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(afresh(lambda: steps(lambda: None)), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = steps(lambda: None)

    def replay() -> torch.Tensor:
        graph.replay()
        return y

    for _ in range(3):
        assert torch.equal(afresh(replay), expected)


@pytest.mark.parametrize("format", ["int8-channel", "int8-channel-asym"])
def test_a_graph_finds_other_outliers(format):
    """x rounded to 8 bits, row by row: the CPU's bits, whatever a replay finds in x."""
    planes = list(quantized(format).planes.values())
    for m in (1, 16, 300):
        x = draw(m, 1024)
        arguments = (format, 512, 1024, None, 6.0)
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            torch.ops.bitfold.linear_int8(x, planes, *arguments)
        warm.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.ops.bitfold.linear_int8(x, planes, *arguments)
        for columns in (0, 3, 200):
            x.copy_(draw(m, 1024).clamp(-5, 5))
            x[:, torch.randperm(1024, device="cuda")[:columns]] *= 20
            graph.replay()
            expected = torch.ops.bitfold.linear_int8(x.cpu(), [plane.cpu() for plane in planes], *arguments)
            assert torch.equal(y.cpu(), expected), f"{format} m={m}, {columns} columns"


def captured(call):
    """call() in a graph, and its output there."""
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm), torch.no_grad():
        call()
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = call()
    return graph, out


@pytest.mark.parametrize("format", KV_FORMATS)
def test_a_graph_captures_attention_to_packed_keys(format):
    """Another query, and other keys in the same pages."""
    law = BlockFormat(format, 64, 128, value_group_of(format, 128))
    store = Store.like(law, 64, draw(1, 2, 1, 128))
    store.append_prompt(draw(1, 2, 700, 128), draw(1, 2, 700, 128))
    query = draw(1, 8, 1, 128)
    graph, out = captured(lambda: attend(query, store, store.tokens, None, 0.1))
    for seed in range(2):
        torch.manual_seed(seed)
        query.copy_(draw(1, 8, 1, 128))
        store.pages[0].copy_(store.pages[0].roll(1, 2))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(out, attend(query, store, store.tokens, None, 0.1))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="torch has no product of 8-bit floats for this GPU",
)
@pytest.mark.parametrize("format", ["fp8-e4m3-channel", "fp8-e4m3-tensor"])
def test_a_graph_captures_products_of_8_bit_floats(format):
    planes = list(quantized(format).planes.values())
    for m in BATCHES:
        x = draw(m, 1024)
        graph, y = captured(lambda x=x: torch.ops.bitfold.linear_fp8(x, planes, format, 512, 1024))
        for scale in (0.01, 30.0):
            x.copy_(draw(m, 1024) * scale)
            graph.replay()
            assert torch.equal(y, torch.ops.bitfold.linear_fp8(x, planes, format, 512, 1024)), f"m={m}"


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_bits_on_every_run(format):
    qtensor = quantized(format, 1000, 4096)
    for m in BATCHES:
        x = draw(m, 4096)
        first = bitfold.linear(x, qtensor)
        assert all(torch.equal(bitfold.linear(x, qtensor), first) for _ in range(20))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_the_device_is_that_of_the_tensors():
    qtensor, x = quantized("int4").to("cuda:1"), draw(3, 1024).to("cuda:1")
    with torch.cuda.device(0):
        y = bitfold.linear(x, qtensor)
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda:1")
    torch.testing.assert_close(y.cpu(), bitfold.linear(x.to("cuda:0"), qtensor.to("cuda:0")).cpu())
    refusal(lambda: bitfold.linear(x.to("cuda:0"), qtensor), "x is on cuda:0; it must be on cuda:1")


def test_more_elements_than_32_bits_count():
    """2^32 + 2^17 weights, and as many outputs; the last rows against those of a small matrix."""
    n, k = 2**16 + 2, 2**16
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("the GPU has no 12 GiB left")
    rows = torch.randn(2, k, generator=torch.Generator().manual_seed(2))
    small = bitfold.encode(rows, "int2-g64")
    planes = {}
    for law in bitfold.formats.parse("int2-g64").planes:
        plane = torch.zeros(law.shape(n, k), dtype=law.dtype, device="cuda")
        plane[-2:] = small.planes[law.name].cuda()
        planes[law.name] = plane
    qtensor = bitfold.QTensor("int2-g64", (n, k), planes)
    wanted = small.decode(torch.float16)
    assert torch.equal(qtensor.decode(torch.float16)[-2:].cpu(), wanted)
    ids = torch.tensor([n - 1, 0, n - 2], device="cuda")
    assert torch.equal(bitfold.embedding(ids, qtensor, torch.float16)[[2, 0]].cpu(), wanted)
    x = draw(1, k)
    expected = bitfold.linear(x, small.to("cuda"))
    assert torch.equal(bitfold.linear(x, qtensor)[:, -2:], expected)


def test_modules_move():
    layer = bitfold.QuantLinear(quantized("nf4-b64-dq").to("cpu"), torch.randn(512))
    x = torch.randn(3, 1024)
    exact = x.double() @ layer.qtensor.decode(torch.float64).T + layer.bias.double()
    layer = layer.cuda()
    assert layer.qtensor.device.type == "cuda"
    # The rounding of fp32 sums of 1024 products, whose order is the device's own.
    assert float((layer(x.cuda()).cpu().double() - exact).norm() / exact.norm()) < 1024**0.5 * 2.0**-24
    half = layer.half()
    assert half.scales.dtype == torch.uint8
    assert half.nested_scales.dtype == torch.float32
    y = half(x.cuda().half())
    assert y.dtype == torch.float16
    assert float((y.cpu().double() - exact).norm() / exact.norm()) < 1e-3


def test_gradients():
    qtensor = quantized("int4-g64")
    x = draw(5, 1024, dtype=torch.float32).requires_grad_()
    grad = draw(5, 512, dtype=torch.float32)
    bitfold.linear(x, qtensor).backward(grad)
    torch.testing.assert_close(x.grad, grad @ qtensor.decode(), rtol=1e-4, atol=1e-4)


def test_cupy_through_dlpack():
    cupy = pytest.importorskip("cupy")
    qtensor = quantized("int4-g128")
    x = cupy.random.standard_normal((3, 1024)).astype(cupy.float16)
    y = cupy.from_dlpack(bitfold.linear(torch.from_dlpack(x), qtensor))
    expected = x @ cupy.from_dlpack(qtensor.decode(torch.float16)).T
    cupy.testing.assert_allclose(y, expected, rtol=1e-2, atol=2e-1)


# ---- bad input ----


def test_tensors_of_two_devices():
    qtensor, x = quantized("int4"), torch.randn(3, 1024)
    refusal(lambda: bitfold.linear(x, qtensor), "x is on the CPU; it must be on cuda:0 like planes")
    refusal(
        lambda: bitfold.linear(x.cuda(), qtensor.to("cpu")),
        "x is on cuda:0; it must be on the CPU like planes",
    )
    bias = torch.zeros(512)
    refusal(lambda: bitfold.linear(x.cuda(), qtensor, bias), "bias is on the CPU; it must be on cuda:0")
    refusal(lambda: bitfold.embedding(torch.tensor([1]), qtensor), "ids is on the CPU; it must be on cuda:0")


def test_whole_number_activations_are_the_cpus():
    refusal(
        lambda: bitfold.linear(draw(1, 1024), quantized("q4_k"), activations="int8"), "activations", "GPU"
    )


# 2 TiB: of torch alone, and of bitfold's op, which asks torch through its stable interface.
OUT_OF_MEMORY = """
import faulthandler, sys
import bitfold, torch
faulthandler.enable()
torch._C._set_print_stack_traces_on_fatal_signal(True)
ids = torch.zeros(2**22, dtype=torch.int64, device="cuda")
qtensor = bitfold.encode(torch.randn(16, 2**16), "int4").to("cuda")
try:
    if sys.argv[1] == "torch":
        torch.empty(2**41, dtype=torch.uint8, device="cuda")
    else:
        bitfold.embedding(ids, qtensor, torch.float64)
except RuntimeError as error:
    print(error)
assert torch.isfinite(bitfold.embedding(ids[:3], qtensor)).all()
"""


def out_of_memory(whose: str) -> subprocess.CompletedProcess:
    """In a process of its own, for one machine's torch 2.11 ended it by a signal."""
    return subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, whose], capture_output=True, text=True)


def test_out_of_memory_is_an_error():
    alone, ours = out_of_memory("torch"), out_of_memory("bitfold")
    if alone.returncode < 0 and ours.returncode < 0:
        pytest.skip(f"torch's own error of memory ends in signal {-alone.returncode} here")
    assert ours.returncode == 0, ours.stderr
    assert "no memory on cuda:0 for a float64 tensor of shape [4194304, 65536]" in ours.stdout


@pytest.mark.parametrize("format", ["int4-g32-asym", "nf4-b64-dq"])
@pytest.mark.parametrize("order", ["static", "none"])
def test_gptq_of_matrices_on_the_gpu(format, order):
    """Its factor is torch's: weights near the middle of two levels may fall to the other, and their rows with them."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 256, generator=draw)
    x = torch.randn(1024, 256, generator=draw) @ (torch.eye(256) + torch.randn(256, 256, generator=draw) / 16)
    hessian, options = x.T @ x, gptq.GptqOptions(order=order)
    wanted = gptq.solve(weight, hessian, format, options)
    first, again = (gptq.solve(weight.cuda(), hessian.cuda(), format, options) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.qtensor.planes.values(), again.qtensor.planes.values(), strict=True)
    )
    got = first.qtensor.decode()
    assert got.is_cuda
    same = torch.isclose(got.cpu(), wanted.qtensor.decode(), rtol=1e-5, atol=1e-7).all(1)
    assert same.sum() >= 0.9 * len(weight)
    assert first.error == pytest.approx(wanted.error, rel=5e-3)
    assert first.rounding_error == pytest.approx(wanted.rounding_error, rel=1e-3)


def test_gptq_takes_no_blocks_apart_on_the_gpu():
    weight, hessian = torch.randn(4, 256, device="cuda"), torch.eye(256, device="cuda")
    refusal(lambda: gptq.solve(weight, hessian, "q4_k"), "weight is on cuda:0", "must be on the CPU")
