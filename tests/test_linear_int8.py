"""linear with activations of 8 bits: the bits of docs/gguf-blocks.md on every instruction set, what they are worth, and
what torch sees of them.
"""

from __future__ import annotations

import copy

import bitfold
import numpy as np
import oracle_gguf
import pytest
import torch
from bitfold.activations import Activations
from bitfold.formats import parse
from bitfold.nn import QuantLinear, set_activations
from cases import DTYPES, block_formats, refusal, some_formats
from golden import golden
from hypothesis import given
from hypothesis import strategies as st
from oracle_int8 import linear as oracle_linear
from test_gguf_blocks import of_blocks, tame_blocks
from test_linear import draw, exact
from torch import nn

every_block = pytest.mark.parametrize("format", block_formats())
BATCHES = (0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 33)
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# By columns of a block: relative norm errors against float64 of the decoded weights, of gaussian x and weights; and
# with a column in 128 whose x is 30 times as large. The largest seen (docs/gguf-blocks.md), and a little more.
ACCURACY = {256: (7.6e-3, 3.4e-2), 32: (5.8e-3, 1.35e-2)}


def int8(x: torch.Tensor, qtensor: bitfold.QTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return bitfold.linear(x, qtensor, bias, activations="int8")


def assert_bits(y: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """fp32 numbers bit for bit; any NaN equals any other."""
    assert tuple(y.shape) == expected.shape, what
    ours, theirs = y.numpy().view(np.uint32), expected.view(np.uint32)
    wrong = (ours != theirs) & ~(np.isnan(y.numpy()) & np.isnan(expected))
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.size} differ, at {np.argwhere(wrong)[0]}"


def assert_oracle(x: torch.Tensor, blocks: np.ndarray, format: str, what: str) -> None:
    assert_bits(int8(x, of_blocks(blocks, format)), oracle_linear(x.numpy(), blocks, format), what)


# ---- the bits ----


@pytest.mark.isa
@every_block
def test_bits_of_every_shape(format, rng):
    values = parse(format).group
    for n, count in [(1, 1), (2, 1), (5, 3), (17, 2), (33, 1), (70, 9), (3, 17)]:
        blocks = tame_blocks(rng, format, n, count)
        for m in BATCHES:
            x = draw(rng, m, count * values, dtype=torch.float32)
            assert_oracle(x, blocks, format, f"{format} m={m} n={n} k={count * values}")


@pytest.mark.isa
@every_block
def test_bits_of_encoded_weights(format, rng):
    """Weights as models have them, the golden bytes too."""
    w = torch.from_numpy(rng.standard_normal((40, 1024)).astype(np.float32))
    x = draw(rng, 9, 1024, dtype=torch.float32)
    assert_oracle(x, bitfold.encode(w, format).planes["blocks"].numpy(), format, format)
    blocks = golden(format).bytes
    k = blocks.shape[1] // oracle_gguf.LAYOUTS[format].bytes * parse(format).group
    assert_oracle(draw(rng, 3, k, dtype=torch.float32), blocks, format, f"{format} golden")


def extremes(rng: np.random.Generator, k: int) -> np.ndarray:
    """Rows of x that rounding stumbles over: [rows, k]."""
    normal = rng.standard_normal((4, k))
    outlier, sparse = normal[:1].copy(), normal[1:2].copy()
    outlier[:, ::61] = 1e4
    sparse[rng.random((1, k)) < 0.97] = -0.0
    sign = np.sign(normal[:1])
    rows = [
        *(normal[:1] * 10.0**e for e in (-45, -40, -38, -32, -30, -20, 15, 30)),
        np.zeros((1, k)),
        np.full((1, k), -0.0),
        outlier,
        sparse,
        sign * 127,  # every code the largest
        sign * np.float32(2.0**-100),
        sign * np.nextafter(np.float32(2.0**-100), np.float32(0)),
        np.full((1, k), -3.4e38),
        rng.integers(-254, 255, (2, k)) / 2 + np.where(np.arange(k) == 0, 127, 0),  # ties
        normal * 10.0 ** rng.uniform(-42, 30, (4, k)),
    ]
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.isa
@every_block
def test_bits_of_extremes(format, rng):
    """Any bytes as blocks, infinite scales too, times rows of any size."""
    layout = oracle_gguf.LAYOUTS[format]
    x = torch.from_numpy(extremes(rng, 512))
    count = 512 // layout.values
    for blocks in (
        tame_blocks(rng, format, 19, count),
        rng.integers(0, 256, (19, count * layout.bytes)).astype(np.uint8),
        np.full((3, count * layout.bytes), 255, np.uint8),
        np.zeros((3, count * layout.bytes), np.uint8),
        np.full((3, count * layout.bytes), 0x7B, np.uint8),
    ):
        assert_oracle(x, blocks, format, format)


@pytest.mark.isa
@given(data=st.data())
def test_any_product(data):
    format = data.draw(st.sampled_from(block_formats()))
    n, m, count = (data.draw(st.integers(low, high)) for low, high in ((1, 70), (1, 20), (1, 12)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((m, count * parse(format).group)) * 10.0 ** data.draw(st.integers(-34, 20))
    assert_oracle(
        torch.from_numpy(x.astype(np.float32)), tame_blocks(rng, format, n, count), format, f"{n} {m} {count}"
    )


@pytest.mark.isa
@every_block
def test_nan_and_infinity_stay_in_their_row(format, rng):
    k = 3 * parse(format).group
    blocks = tame_blocks(rng, format, 40, 3)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for m in (1, 3, 20):
            x = draw(rng, m, k, dtype=torch.float32)
            clean = int8(x, of_blocks(blocks, format))
            row = m // 2
            x[row, k - 1] = bad
            y = int8(x, of_blocks(blocks, format))
            assert y[row].isnan().all()
            others = [j for j in range(m) if j != row]
            assert torch.equal(y[others], clean[others])


@every_block
def test_rows_and_threads_do_not_matter(format, rng, threads):
    k = 5 * parse(format).group
    qtensor = of_blocks(tame_blocks(rng, format, 203, 5), format)
    x = draw(rng, 300, k, dtype=torch.float32)  # more than are multiplied at a time
    together = int8(x, qtensor)
    for count in (1, 2, 4):
        threads(count)
        assert torch.equal(int8(x, qtensor), together)
        for m in (1, 2, 7, 8, 9):
            assert torch.equal(int8(x[-m:], qtensor), together[-m:])


# ---- dtypes, strides, bias ----


@pytest.mark.isa
@every_block
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_and_bias(format, dtype, rng):
    """x becomes fp32 first; the bias comes last, and then the dtype of x."""
    blocks = tame_blocks(rng, format, 37, 2)
    for m in (1, 4, 11):
        x = draw(rng, m, 2 * parse(format).group, dtype=dtype)
        bias = draw(rng, 37, dtype=dtype)
        sums = torch.from_numpy(oracle_linear(x.float().numpy(), blocks, format))
        y = int8(x, of_blocks(blocks, format))
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.equal(y, sums.to(dtype))
        assert torch.equal(int8(x, of_blocks(blocks, format), bias), (sums + bias.float()).to(dtype))


@every_block
def test_strides_and_leading_dimensions(format, rng):
    k = 2 * parse(format).group
    qtensor = of_blocks(tame_blocks(rng, format, 9, 2), format)
    base = draw(rng, 2, 6, 2 * k, dtype=torch.float32)
    views = (base[..., :k], base[..., ::2], base[0, 0, :k], draw(rng, k, 12, dtype=torch.float32).t())
    for x in (*views, base[:1, :1, :1].expand(1, 5, k), base[:, :0, :k]):
        y = int8(x, qtensor)
        assert y.shape == (*x.shape[:-1], 9)
        assert torch.equal(y, int8(x.contiguous(), qtensor))


@every_block
def test_empty_sizes(format):
    values = parse(format).group
    for n, k in [(0, values), (5, 0), (0, 0)]:
        empty = bitfold.encode(torch.zeros(n, k), format)
        for m in (0, 1, 9):
            assert torch.equal(int8(torch.ones(m, k), empty), torch.zeros(m, n))
            assert torch.equal(int8(torch.ones(m, k), empty, torch.ones(n)), torch.ones(m, n))


@pytest.mark.isa
@every_block
def test_blocks_inside_other_bytes(format, rng):
    """Bytes around the plane are not read as weights, wherever it starts."""
    blocks = tame_blocks(rng, format, 35, 3)
    x = draw(rng, 2, 3 * parse(format).group, dtype=torch.float32)
    expected = int8(x, of_blocks(blocks, format))
    for offset in (0, 1, 2, 7):
        buffer = torch.full((blocks.size + 64,), 255, dtype=torch.uint8)
        inside = buffer[offset : offset + blocks.size].view(blocks.shape)
        inside.copy_(torch.from_numpy(blocks))
        qtensor = bitfold.QTensor(format, (35, x.shape[1]), {"blocks": inside})
        assert torch.equal(int8(x, qtensor), expected)


# ---- what it is worth ----


@every_block
def test_accuracy(format, rng):
    """Against float64 of the decoded weights. Rounding to 8 bits is all that there is: fp32 sums don't show."""
    w = torch.from_numpy(rng.standard_normal((64, 4096)).astype(np.float32))
    qtensor = bitfold.encode(w, format)
    for scale, limit in zip((1, 30), ACCURACY[parse(format).group], strict=True):
        x = draw(rng, 8, 4096, dtype=torch.float32)
        x[:, ::128] *= scale
        reference = exact(x) @ exact(qtensor.decode()).T
        error = np.linalg.norm(exact(int8(x, qtensor)) - reference) / np.linalg.norm(reference)
        assert 0.5 * limit < error < limit, f"{format}: {error:.2e}"


# ---- torch ----


def test_opcheck(rng):
    for format in ("q4_k", "q8_0"):
        k = parse(format).group * 2
        blocks = torch.from_numpy(tame_blocks(rng, format, 6, 2))
        x = draw(rng, 3, k, dtype=torch.float32).requires_grad_()
        bias = draw(rng, 6, dtype=torch.float32).requires_grad_()
        arguments = (x, [blocks], format, 6, k, bias, "rows", "int8")
        torch.library.opcheck(torch.ops.bitfold.linear.default, arguments, test_utils=OPCHECKS)


def test_gradients_go_straight_through(rng):
    """As if x were not rounded: those of the product with float activations, twice too; the bias's is exact."""
    qtensor = of_blocks(tame_blocks(rng, "q4_k", 7, 2), "q4_k")
    grads = []
    for activations in ("float", "int8"):
        x = torch.linspace(-1, 1, 3 * 512).reshape(3, 512).requires_grad_()
        bias = torch.ones(7, requires_grad=True)
        y = bitfold.linear(x, qtensor, bias, activations=activations)
        weights = torch.linspace(-1, 1, 21).reshape(3, 7)
        (grad,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True, retain_graph=True)
        (y * weights).sum().backward()
        grads.append((grad.detach(), x.grad, bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_casts_x_and_bias(rng):
    qtensor = of_blocks(tame_blocks(rng, "q6_k", 7, 1), "q6_k")
    x, bias = draw(rng, 4, 256, dtype=torch.float32), draw(rng, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = int8(x, qtensor, bias)
    assert torch.equal(y, int8(x.bfloat16(), qtensor, bias.bfloat16()))


def test_compiled(rng):
    import torch._dynamo

    torch._dynamo.reset()
    qtensor = of_blocks(tame_blocks(rng, "q5_k", 24, 1), "q5_k")
    layer = QuantLinear(qtensor, activations="int8")

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x):
        return layer(x * 2) + int8(x, qtensor)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (11, 2, 9):
            x = draw(rng, m, 256, dtype=torch.float32)
            assert torch.equal(run(x), int8(x * 2, qtensor) + int8(x, qtensor))
    torch._dynamo.reset()


# ---- modules, plans, errors ----


def test_module(rng):
    qtensor = of_blocks(tame_blocks(rng, "q4_k", 7, 2), "q4_k")
    x = draw(rng, 3, 512, dtype=torch.float32)
    layer = QuantLinear(qtensor)
    assert layer.activations == Activations("float")
    assert torch.equal(layer(x), bitfold.linear(x, qtensor))
    layer.activations = "int8"
    assert torch.equal(layer(x), int8(x, qtensor))
    assert torch.equal(copy.deepcopy(layer)(x), int8(x, qtensor))
    assert "int8" in repr(layer)
    assert list(layer.state_dict()) == ["blocks"]
    for wrong in ("int4", "", "Int8"):
        refusal(lambda wrong=wrong: setattr(layer, "activations", wrong), "activations", "float", "int8")
    assert layer.activations == Activations("int8")


def test_a_model_changes_as_a_whole_or_not_at_all(rng):
    blocks = [QuantLinear(of_blocks(tame_blocks(rng, format, 256, 1), format)) for format in ("q4_k", "q6_k")]
    model = nn.Sequential(*blocks, nn.LayerNorm(256), nn.Linear(256, 3))
    set_activations(model, "int8")
    assert [str(layer.activations) for layer in blocks] == ["int8", "int8"]
    x = draw(rng, 2, 256, dtype=torch.float32)
    rounded = model(x)
    set_activations(model, "float")
    assert not torch.equal(model(x), rounded)
    model.append(QuantLinear(bitfold.encode(torch.ones(4, 3), "int4")))
    refusal(lambda: set_activations(model, "int8"), "layer '4'", "int4-g128")
    assert [str(layer.activations) for layer in blocks] == ["float", "float"]
    refusal(lambda: set_activations(nn.Sequential(nn.Linear(3, 3)), "int8"), "no quantized")


def test_the_plan_names_int8():
    for format in block_formats():
        for m in (1, 8, 9, 500):
            plan = bitfold.plan_linear(format, m, 64, 256, torch.bfloat16, activations="int8")
            assert plan.operands == "int8"
            assert plan.regime == "tiled"
            assert plan.reason
    assert bitfold.plan_linear("q4_k", 1, 64, 256, activations="float") == bitfold.plan_linear(
        "q4_k", 1, 64, 256
    )


def test_other_formats_are_refused():
    """No silent fallback: one sentence, from the function, the op, the plan and the module."""
    for format in some_formats():
        qtensor = bitfold.encode(torch.ones(3, 64), format)
        planes = list(qtensor.planes.values())
        for call in (
            lambda q=qtensor, p=planes: torch.ops.bitfold.linear(
                torch.ones(1, 64), p, q.format, 3, 64, None, "rows", "int8"
            ),
            lambda f=format: bitfold.plan_linear(f, 1, 3, 64, activations="int8"),
            # the function and a layer round rows of int8 with one scale for a row instead (test_rows_int8.py)
            *(
                []
                if Activations("int8").fits(parse(format))
                else [
                    lambda q=qtensor: int8(torch.ones(1, 64), q),
                    lambda q=qtensor: QuantLinear(q, activations="int8"),
                ]
            ),
        ):
            message = refusal(call, "activations", "int8", "float")
            assert qtensor.format in message


def test_unknown_activations_are_refused(rng):
    qtensor = of_blocks(tame_blocks(rng, "q4_k", 3, 1), "q4_k")
    for wrong in ("int4", "fp8", "", "INT8", "float "):
        refusal(
            lambda wrong=wrong: bitfold.linear(torch.ones(1, 256), qtensor, activations=wrong),
            "activations",
            "'float' or 'int8'",
        )


def test_a_gguf_file_runs_with_it(tmp_path, capsys):
    """bitfold.load and the commands, whose answers change a little and not more."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    import gguf_models
    from bitfold.gguf import export
    from command import call, call_json

    source = gguf_models.write_directory(tmp_path / "source", "llama", hidden_size=256, intermediate_size=512)
    file = gguf_models.write_file(export.read_directory(source), tmp_path / "model.gguf", "q4_k")
    model, rounding = bitfold.load(file), bitfold.load(file, activations="int8")
    layers = [module for module in rounding.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert {str(layer.activations) for layer in layers} == {"int8"}
    ids = torch.tensor([[1, 5, 9, 2, 40]])
    with torch.inference_mode():
        wanted, found = model(ids).logits, rounding(ids).logits
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    refusal(lambda: bitfold.load(file, activations="int4"), "activations", "float, int8")
    text = tmp_path / "text.txt"
    text.write_text("a text of some words " * 20)
    told = [
        call_json(capsys, "eval", file, "--text", text, "--context", 32, "--activations", kind)["perplexity"]
        for kind in ("float", "int8")
    ]
    assert told[0] != told[1]
    generated = call_json(
        capsys, "generate", file, "--prompt", "a", "--max-new-tokens", 3, "--activations", "int8"
    )
    assert generated["tokens"] == 3
    code, _, err = call(capsys, "generate", source, "--prompt", "a", "--activations", "int8")
    assert code != 0
    assert "not quantized" in err
