"""The op linear_int8 and the layers on it: x rounded to 8 bits, row by row, but for columns with outliers."""

from __future__ import annotations

import copy
import json
import math

import bitfold
import numpy as np
import oracle_rows_int8 as oracle
import pytest
import torch
from bitfold import activations
from bitfold.activations import Activations, llm_int8
from bitfold.dequantize import dequantize
from bitfold.nn import QuantLinear, set_activations
from bitfold.shards import CheckpointError
from cases import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

FORMATS = (
    "int8-channel",
    "int8-channel-sfp32",
    "int8-channel-asym-sbf16",
    "int8-tensor",
    "int8-tensor-asym-sfp32",
)
op = torch.ops.bitfold.linear_int8


def numpy_of(x: Tensor) -> np.ndarray:
    """As the product sees it: binary64, or binary32."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).numpy()


class Case:
    """A weight, as planes and as the oracle wants it. columns: of which there is a copy."""

    def __init__(self, n: int, k: int, format: str, columns: list[int] | None = None, seed: int = 0):
        self.n, self.k, self.columns = n, k, columns or []
        rng = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(n, k, generator=rng)
        self.qtensor = bitfold.encode(self.weight, format)
        self.planes = list(self.qtensor.planes.values())
        self.copy = self.weight[:, self.columns].bfloat16() if columns else None

    def run(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        threshold: float = 0.0,
        per_row: bool = False,
        x_scale=None,
    ):
        columns = torch.tensor(self.columns, dtype=torch.int32) if self.columns else None
        scale = None if x_scale is None else torch.tensor(x_scale)
        return op(
            x,
            self.planes,
            self.qtensor.format,
            self.n,
            self.k,
            bias,
            threshold,
            per_row,
            scale,
            columns,
            self.copy,
        )

    def expected(self, x: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        parts = self.qtensor.unpack()
        zeros = np.array([128]) if parts.zeros is None else parts.zeros.numpy().reshape(-1)
        y = oracle.linear(
            numpy_of(x.flatten(0, -2)),
            parts.codes.numpy(),
            np.broadcast_to(parts.scales.double().numpy().reshape(-1), self.n),
            np.broadcast_to(zeros, self.n),
            None if bias is None else numpy_of(bias),
            columns=self.columns,
            copy=None if self.copy is None else self.copy.float().numpy(),
            **options,
        )
        return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], self.n)

    def check(self, x: Tensor, bias: Tensor | None = None, **options) -> None:
        found, wanted = self.run(x, bias, **options), self.expected(x, bias, **options)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def hard(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of many sizes, zeros, some outliers."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=rng, dtype=torch.float64)
    x *= (torch.rand(m, k, generator=rng) > 0.1).double()
    x[torch.rand(m, k, generator=rng) > 0.995] *= 40
    return x.to(dtype)


OPTIONS = (
    {},
    {"threshold": 2.5},
    {"threshold": 2.5, "per_row": True},
    {"x_scale": 0.03},
    {"threshold": 1e-30},
)


# ---- the product, to the bit ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_is_what_the_page_says(format, options):
    for m in (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 25, 70):
        for n, k in ((37, 299), (64, 64), (1, 1), (130, 1030), (5, 0), (0, 5)):
            Case(n, k, format).check(hard(m, k, torch.float32), torch.linspace(-1, 1, n), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    for options in OPTIONS:
        for columns in (None, [0, 7, 8, 98]):
            case = Case(67, 99, "int8-channel", columns)
            for m in (1, 7, 20):
                case.check(
                    hard(m, 99, dtype), torch.linspace(-1, 1, 67, dtype=torch.float64).to(dtype), **options
                )
                case.check(hard(m, 99, dtype), **options)


def test_more_columns_than_32_bits_hold():
    for m in (3, 11):
        case = Case(3, 140_000, "int8-channel-asym", [5, 139_999])
        case.qtensor.planes["codes"].fill_(255)
        case.check(hard(m, 140_000, torch.float32).abs() + 1, threshold=30.0)
        case.check(torch.full((m, 140_000), 3.0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_threshold_and_copy(data):
    m, n, k = (data.draw(st.integers(0, most), name) for name, most in (("m", 20), ("n", 70), ("k", 150)))
    columns = sorted(data.draw(st.sets(st.integers(0, max(k - 1, 0)), max_size=6))) if k else []
    case = Case(n, k, data.draw(st.sampled_from(FORMATS)), columns, seed=data.draw(st.integers(0, 99)))
    x = hard(
        m, k, data.draw(st.sampled_from([torch.float32, torch.bfloat16])), seed=data.draw(st.integers(0, 99))
    )
    for place in data.draw(st.lists(st.integers(0, max(m * k - 1, 0)), max_size=2)) if m * k else []:
        x.view(-1)[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e-38, 3e38]))
    case.check(x, threshold=data.draw(st.sampled_from([0.0, 1.0, 6.0])), per_row=data.draw(st.booleans()))


def test_the_function_rounds_rows_too():
    """bitfold.linear, of weights that linear_int8 has; for others it says which they are."""
    for format in FORMATS:
        case = Case(20, 96, format)
        x, bias = torch.randn(2, 3, 96), torch.randn(20)
        y = bitfold.linear(x, case.qtensor, bias, activations="int8")
        assert torch.equal(y, case.run(x, bias))
        assert not torch.equal(y, bitfold.linear(x, case.qtensor, bias))
        module = QuantLinear(case.qtensor, bias, "int8")
        assert torch.equal(y, module(x))
        message = refusal(lambda c=case: bitfold.plan_linear(c.qtensor.format, 1, 20, 96, activations="int8"))
        assert "GGUF's block formats alone" in message
        assert "linear_int8 multiplies int8 weights" in message
    for format in ("int4-g32", "int8-g32", "nf4-b32"):
        qtensor = bitfold.encode(torch.ones(4, 32), format)
        refusal(
            lambda q=qtensor: bitfold.linear(torch.ones(1, 32), q, activations="int8"), format, "int8-channel"
        )


def test_a_number_that_is_none_stays_in_its_row():
    case = Case(40, 96, "int8-channel", [3])
    clean = hard(6, 96, torch.float32).clamp(-5, 5)
    for value in (math.nan, math.inf, -math.inf):
        for place in (3, 50):  # with a copy and without
            x = clean.clone()
            x[2, place] = value
            for options in ({"threshold": 6.0}, {"threshold": 6.0, "per_row": True}, {"x_scale": 0.1}, {}):
                found, whole = case.run(x, **options), case.run(clean, **options)
                assert found[2].isnan().all()
                rest = [0, 1, 3, 4, 5]
                assert torch.equal(found[rest], whole[rest]), "the other rows have other bits"


def test_rows_are_independent_where_they_should_be():
    case = Case(40, 96, "int8-channel")
    x = hard(30, 96, torch.bfloat16)
    alone = torch.cat([case.run(row[None], threshold=2.0, per_row=True) for row in x])
    assert torch.equal(case.run(x, threshold=2.0, per_row=True), alone)
    alone = torch.cat([case.run(row[None]) for row in x])
    assert torch.equal(case.run(x), alone)
    shared = case.run(x, threshold=2.0)
    assert not torch.equal(shared, case.run(x, threshold=2.0, per_row=True))


def test_threads_and_strides_change_nothing():
    case = Case(300, 257, "int8-channel", [1, 2, 200])
    for m in (1, 5, 40):
        x = hard(m, 257, torch.bfloat16)
        wanted = case.run(x, threshold=2.0)
        before = torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(case.run(x, threshold=2.0), wanted)
        torch.set_num_threads(before)
        wide = torch.empty(m, 514, dtype=x.dtype)
        wide[:, ::2] = x
        assert torch.equal(case.run(wide[:, ::2], threshold=2.0), wanted)
        assert torch.equal(case.run(x.t().contiguous().t(), threshold=2.0), wanted)
        assert torch.equal(case.run(x.reshape(1, m, 257), threshold=2.0)[0], wanted)


def test_outliers_in_16_bits_are_worth_it():
    """Against float64 of the weight: a column of 60 ruins plain int8, and a copy also mends the weight's own column."""
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 512, generator=rng)
    x = torch.randn(64, 512, generator=rng)
    x[:, 77] *= 70
    weight[:, 77] /= 70
    truth = x.double() @ weight.double().t()
    qtensor = bitfold.encode(weight, "int8-channel-sfp32")
    exact = {
        "outlier_columns": torch.tensor([77], dtype=torch.int32),
        "outlier_weight": weight[:, [77]].half(),
    }

    def error(layer: QuantLinear) -> float:
        return float((layer(x).double() - truth).norm() / truth.norm())

    plain, mixed = (
        error(QuantLinear(qtensor, activations="int8")),
        error(QuantLinear(qtensor, activations="llm-int8")),
    )
    copied = error(QuantLinear(qtensor, activations="llm-int8-exact", **exact))
    assert plain > 10 * copied
    assert plain > mixed > copied
    assert copied < 0.015


# ---- torch ----


def test_opcheck():
    case = Case(6, 32, "int8-channel", [3, 9])
    columns = torch.tensor(case.columns, dtype=torch.int32)
    x = hard(4, 32, torch.float32).requires_grad_()
    for extra in (
        (None, 0.0, False, None, None, None),
        (torch.ones(6, requires_grad=True), 2.0, True, None, columns, case.copy),
        (None, 0.0, False, torch.tensor(0.1), None, None),
    ):
        torch.library.opcheck(op.default, (x, case.planes, case.qtensor.format, 6, 32, *extra))


def test_gradients():
    """With a threshold below every number nothing is rounded, and the product is linear."""
    for columns in (None, [0, 4]):
        case = Case(5, 9, "int8-channel", columns)
        x = torch.randn(
            3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        ).requires_grad_()
        bias = torch.randn(5, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, b, c=case: c.run(x, b, threshold=1e-12), (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, b, c=case: c.run(x, b, threshold=1e-12), (x, bias))
    # Straight through the rounding: as if x had not been rounded.
    x = hard(3, 9, torch.float32).requires_grad_()
    case.run(x, threshold=2.0).sum().backward()
    decoded = case.qtensor.decode()
    decoded[:, case.columns] = case.copy.float()
    torch.testing.assert_close(x.grad, decoded.sum(0).expand(3, 9))


def test_compile_and_autocast():
    case = Case(16, 32, "int8-channel", [3])
    layer = QuantLinear(
        case.qtensor,
        torch.ones(16),
        "llm-int8-t2-exact",
        outlier_columns=torch.tensor([3], dtype=torch.int32),
        outlier_weight=case.copy,
    )
    x = hard(5, 32, torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, case.run(x.bfloat16(), torch.ones(16).bfloat16(), threshold=2.0))
    with torch.device("meta"):
        assert op(torch.empty(2, 0, 32), [p.to("meta") for p in case.planes], "int8", 16, 32).shape == (
            2,
            0,
            16,
        )


# ---- layers, recipes, checkpoints ----


def small() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).bfloat16()


def test_a_recipe_quantizes_a_model():
    model = small()
    plain = copy.deepcopy(model)
    bitfold.quantize(model, "llm-int8", quiet=True)
    assert [str(layer.activations) for layer in model if isinstance(layer, QuantLinear)] == ["llm-int8"] * 2
    assert model[0].format == "int8-channel-sfp32"
    x = hard(6, 64, torch.bfloat16)
    assert (model(x) - plain(x)).norm() < 0.03 * plain(x).norm()
    set_activations(model, "float")
    assert torch.equal(model(x), model[2](model[1](bitfold.linear(x, model[0].qtensor, model[0].bias))))


def kept_layer() -> QuantLinear:
    case = Case(16, 32, "int8-channel", [3, 30])
    return QuantLinear(
        case.qtensor,
        activations="llm-int8-t3-exact",
        x_scale=torch.tensor(0.5),
        outlier_columns=torch.tensor([3, 30], dtype=torch.int32),
        outlier_weight=case.copy,
    )


def test_what_a_layer_keeps_survives_checkpoints_and_casts(tmp_path):
    x = hard(5, 32, torch.float32)
    model = nn.Sequential(kept_layer(), kept_layer())
    model[1] = QuantLinear(Case(8, 16, "int8").qtensor, activations="int8-static", x_scale=torch.tensor(0.5))
    wanted = model(x)
    bitfold.save(model, tmp_path / "a")
    other = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 8, bias=False))
    loaded = bitfold.load(tmp_path / "a", model=other)
    assert str(loaded[0].activations) == "llm-int8-t3-exact"
    assert loaded[1].activations == Activations("int8-static")
    assert torch.equal(loaded(x), wanted)
    assert [p.dtype for p in loaded.bfloat16().parameters()] == [p.dtype for p in model.parameters()]
    fresh = QuantLinear.empty(
        "int8", 16, 32, activations="llm-int8-exact", outliers=2, outlier_dtype=torch.bfloat16
    )
    state = {name: part for name, part in model[0].state_dict().items() if name != "x_scale"}
    fresh.load_state_dict(state)
    assert torch.equal(fresh.outlier_weight, model[0].outlier_weight)
    state["outlier_weight"] = state["outlier_weight"].float()
    with pytest.raises(RuntimeError, match=r"outlier_weight is torch\.float32"):
        fresh.load_state_dict(state)


def test_decoding_puts_copies_in_their_columns():
    """What a layer multiplies with, in the place of the codes that nothing looks at."""
    layer, columns = kept_layer(), [3, 30]
    wanted = layer.qtensor.decode()
    wanted[:, columns] = layer.outlier_weight.float()
    assert not torch.equal(wanted, layer.qtensor.decode())
    assert torch.equal(layer.decode(), wanted)
    x = torch.zeros(2, 32)
    x[:, columns] = torch.tensor([[1.0, 0.25], [-2.0, 8.0]])
    torch.testing.assert_close(layer(x), x @ wanted.T)
    layer.activations = "llm-int8-t3"
    assert torch.equal(layer.decode(), layer.qtensor.decode())
    layer.activations = "llm-int8-exact"
    plain = dequantize(nn.Sequential(layer), torch.bfloat16)[0]
    assert torch.equal(plain.weight, wanted.bfloat16())


def test_an_entry_that_contradicts_itself_is_refused(tmp_path):
    model = nn.Sequential(kept_layer())
    model[0].activations = "llm-int8-exact"
    bitfold.save(model, tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())
    entry = config["quantization_config"]["modules"]["0"]
    assert (entry["activations"], entry["outliers"], entry["outlier_dtype"]) == (
        "llm-int8-exact",
        2,
        "bfloat16",
    )
    for wrong in (
        {"activations": "fp7"},
        {"outliers": 0},
        {"outliers": 33},
        {"outliers": "2"},
        {"outlier_dtype": "float32"},
        {"format": "int4-g128"},
    ):
        entry_now = {**entry, **wrong}
        config["quantization_config"]["modules"]["0"] = entry_now
        file.write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            bitfold.load(tmp_path / "a", model=nn.Sequential(nn.Linear(32, 16, bias=False)))


# ---- the axis ----


@pytest.mark.parametrize(
    "text",
    ["float", "int8", "int8-static", "llm-int8", "llm-int8-t5", "llm-int8-t0.1-rows-exact", "llm-int8-exact"],
)
def test_strings_are_canonical(text):
    assert str(activations.read(text)) == text
    assert activations.read(str(activations.read(text))) == activations.read(text)


@given(st.floats(min_value=1e-300, max_value=1e300), st.booleans(), st.booleans())
def test_any_threshold_is_read_back(threshold, per_row, exact):
    wanted = llm_int8(threshold, per_row=per_row, exact_outliers=exact)
    assert activations.read(str(wanted)) == wanted


def test_no_threshold_is_plain_int8():
    assert llm_int8(0) == llm_int8(None) == Activations("int8") == activations.read("llm-int8-t0")
    assert str(activations.read("llm-int8-t6")) == "llm-int8"


# ---- bad input ----


def test_bad_input():
    case = Case(6, 32, "int8-channel", [3, 9])
    x, format = torch.ones(2, 32), case.qtensor.format
    columns, copied = torch.tensor([3, 9], dtype=torch.int32), case.copy

    def call(**options):
        order = ("bias", "threshold", "per_row", "x_scale", "outlier_columns", "outlier_weight")
        defaults = {"threshold": 0.0, "per_row": False}
        arguments = [options.get(name, defaults.get(name)) for name in order]
        return lambda: op(options.get("x", x), case.planes, format, 6, 32, *arguments)

    for wrong in (-1.0, math.nan, math.inf):
        refusal(call(threshold=wrong), "threshold is ", "at least 0")
    refusal(call(threshold=6.0, x_scale=torch.tensor(1.0)), "x_scale")
    for wrong in (0.0, -1.0, math.nan, math.inf):
        refusal(call(x_scale=torch.tensor(wrong)), "x_scale is", "above 0")
    refusal(call(x_scale=torch.ones(2)), "x_scale", "one float32")
    refusal(call(outlier_columns=columns), "both or none")
    for wrong in ([9, 3], [3, 3], [-1, 3], [3, 32]):
        refusal(
            call(outlier_columns=torch.tensor(wrong, dtype=torch.int32), outlier_weight=copied),
            "outlier_columns\\[",
        )
    refusal(call(outlier_columns=columns.long(), outlier_weight=copied), "outlier_columns", "int32")
    refusal(
        call(outlier_columns=columns, outlier_weight=copied.float()), "outlier_weight", "float16 or bfloat16"
    )
    refusal(call(outlier_columns=columns, outlier_weight=copied[:, :1]), "outlier_weight", "\\[6, 2\\]")
    refusal(call(x=torch.ones(2, 31)), "x has shape", "k = 32")
    refusal(call(x=torch.ones(2, 32).int()), "x is int32")
    refusal(call(bias=torch.ones(5)), "bias", "\\[6\\]")
    for other in ("int8-g32", "int4", "q8_0", "fp8-e4m3", "bf16"):
        qtensor = bitfold.encode(torch.ones(6, 32), other)
        refusal(
            lambda q=qtensor: op(x, list(q.planes.values()), q.format, 6, 32), "format is", "int8-channel"
        )
        refusal(
            lambda q=qtensor: QuantLinear(q, activations="llm-int8"),
            "activations is 'llm-int8'",
            "int8-channel",
        )
    for wrong in ("llm-int8-t-1", "llm-int8-tx", "llm-int8-tnan", "llm-int8-x", "llm", "int8-dynamic"):
        refusal(lambda wrong=wrong: activations.read(wrong), "threshold|activations is")
    refusal(lambda: QuantLinear(case.qtensor, activations="int8-static"), "x_scale")
    refusal(lambda: QuantLinear(case.qtensor, activations="llm-int8-exact"), "outlier_columns")
    refusal(lambda: Activations("int8", threshold=3.0), "llm-int8")
