"""QuantLinear and QuantEmbedding as modules: what moves, copies and state dicts do to planes (nothing)."""

import copy
import io
import pickle

import bitfold
import pytest
import torch
import torch._dynamo
from bitfold import QuantEmbedding, QuantLinear
from cases import columns
from torch import nn

VARIANTS = [
    *(format.canonical for format in bitfold.FORMATS.values()),
    "int4-g16-asym-sfp32",
    "int8-tensor-asym",
    "nf4-b32-dq",
]
N = 12
MOVES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16),
    "to both": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
    "cpu": lambda m: m.cpu(),
}


def weight(n=N, k=None, seed=0):
    k = k or columns("int4")
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


class Both(nn.Module):
    """A parent, as planes are mostly moved through one."""

    def __init__(self, format):
        super().__init__()
        k = columns(format)
        self.embed = QuantEmbedding(bitfold.encode(weight(k=k), format), padding_idx=3)
        self.norm = nn.LayerNorm(k)
        self.linear = QuantLinear(bitfold.encode(weight(k=k, seed=1), format), torch.linspace(-1, 1, N))

    def forward(self, ids):
        return self.linear(self.norm(self.embed(ids)))


@pytest.fixture(params=VARIANTS)
def model(request):
    return Both(request.param)


IDS = torch.tensor([[0, 3, 11], [5, 5, 1]])


def planes(module):
    return {
        name: plane.detach().clone()
        for name, plane in module.named_parameters()
        if name.split(".")[-1] in ("blocks", "codes", "scales", "zeros", "nested_scales", "nested_offset")
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, plane in before.items():
        assert plane.dtype == after[name].dtype
        assert torch.equal(plane, after[name])


def test_forward_is_that_of_the_decoded_weights(model):
    decoded = model.linear.qtensor.decode()
    embedded = model.embed.qtensor.decode()[IDS]
    assert torch.equal(model.embed(IDS), embedded)
    expected = nn.functional.linear(model.norm(embedded), decoded, model.linear.bias)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


def test_planes_are_frozen_parameters(model):
    for module in (model.linear, model.embed):
        for name, plane in module.qtensor.planes.items():
            parameter = getattr(module, name)
            assert isinstance(parameter, nn.Parameter)
            assert parameter is plane
            assert not parameter.requires_grad
    assert model.linear.bias.requires_grad
    assert f"format={model.linear.format}" in repr(model)


@pytest.mark.parametrize("move", MOVES)
def test_moves_never_touch_planes(model, move):
    before = planes(model)
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    MOVES[move](model)
    assert_same(before, planes(model))
    dtype = model.norm.weight.dtype
    assert model.linear.bias.dtype == dtype
    assert model.embed.dtype == dtype
    assert model(IDS).dtype == dtype
    assert ids == {name: id(parameter) for name, parameter in model.named_parameters()}


def test_to_meta_and_back_to_empty(model):
    before = planes(model)
    model.to("meta")
    for name, plane in model.named_parameters():
        assert plane.is_meta
        if name in before:
            assert plane.dtype == before[name].dtype
            assert plane.shape == before[name].shape
            assert not plane.requires_grad
    assert model(IDS.to("meta")).shape == (2, 3, N)
    model.to_empty(device="cpu")
    assert {name: plane.dtype for name, plane in planes(model).items()} == {
        name: plane.dtype for name, plane in before.items()
    }


def test_meta_planes_refuse_real_inputs():
    model = Both("int4-g32").to("meta")
    with pytest.raises(ValueError, match="cpu and meta; all must be on one device"):
        model.linear(weight(2))
    with pytest.raises(ValueError, match="cpu and meta; all must be on one device"):
        model.embed(IDS)


def test_share_memory(model):
    before = planes(model)
    model.share_memory()
    assert model.linear.planes()[0].is_shared()
    assert_same(before, planes(model))


def test_copies(model):
    expected = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(planes(model), planes(twin))
        assert torch.equal(twin(IDS), expected)
        assert twin.linear.planes()[0].data_ptr() != model.linear.planes()[0].data_ptr()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IDS), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(model, assign):
    other = Both(model.linear.format)
    with torch.no_grad():
        for plane in planes(other).values():
            plane.zero_()
        other.norm.weight.fill_(7)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    result = other.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(planes(model), planes(other))
    assert torch.equal(other(IDS), model(IDS))
    assert all(not plane.requires_grad for name, plane in other.named_parameters() if name in planes(other))


def test_state_dict_of_another_dtype_is_refused():
    model = Both("int4-g32")
    before = planes(model)
    state = Both("int4-g32-sbf16").state_dict()
    with pytest.raises(RuntimeError, match=r"linear.scales is torch.bfloat16; for int4-g32 it must be"):
        model.load_state_dict(state)
    for name in ("linear.scales", "embed.scales"):
        assert torch.equal(planes(model)[name], before[name])


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Both("int4-g32").load_state_dict(Both("int4-g64").state_dict())


@pytest.mark.parametrize("format", VARIANTS)
def test_empty_loads(format):
    source = Both(format)
    for cls, kind in ((QuantLinear, source.linear), (QuantEmbedding, source.embed)):
        more = {"bias": True} if cls is QuantLinear else {"padding_idx": 3}
        k = columns(format)
        module = cls.empty(format, N, k, device="meta", **more)
        assert all(p.is_meta for p in module.parameters())
        assert module.shape == (N, k)
        module.load_state_dict(kind.state_dict(), assign=True)
        x = IDS if cls is QuantEmbedding else weight(2, k)
        assert torch.equal(module(x), kind(x))


def test_tied_modules_share_their_parameters():
    embed = QuantEmbedding(bitfold.encode(weight(), "int4-g32"))
    head = QuantLinear(embed.qtensor)
    model = nn.ModuleDict({"embed": embed, "head": head})
    for twin in (model, copy.deepcopy(model), model.bfloat16()):
        assert twin["head"].codes is twin["embed"].codes
        assert twin["head"].scales is twin["embed"].scales
    assert len(list(model.parameters())) == 2


def test_input_dtypes_and_gradients():
    linear = QuantLinear(bitfold.encode(weight(), "nf4-b32"), torch.zeros(N))
    x = weight(2, seed=3).requires_grad_()
    linear(x).square().sum().backward()
    assert x.grad is not None
    assert linear.bias.grad is not None
    assert linear.codes.grad is None
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert linear.to(dtype)(x.detach().to(dtype)).dtype == dtype


def test_no_grad_and_grad_give_the_same_bits():
    linear = QuantLinear(bitfold.encode(weight(), "int4-g32"), torch.ones(N))
    x = weight(2, seed=3).requires_grad_()
    with torch.no_grad():
        quiet = linear(x)
    with torch.inference_mode():
        inferred = linear(x)
    assert not quiet.requires_grad
    assert torch.equal(quiet, linear(x))
    assert torch.equal(quiet, inferred)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_that_of_linear(grad):
    linear = QuantLinear(bitfold.encode(weight(), "int4-g32"), torch.ones(N))
    before = planes(linear)
    x = weight(2, seed=3).requires_grad_(grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear.bfloat16()(x.bfloat16()))
    assert_same(before, planes(linear))
    if grad:
        y.sum().backward()
        assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_once_for_all_batches(grad):
    torch._dynamo.reset()
    model = Both("int4-g16-asym")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(grad):
        for batch in (2, 3, 5, 9):
            ids = torch.arange(batch * 4).reshape(batch, 4) % N
            torch.testing.assert_close(compiled(ids), model(ids))


def test_bad_bias():
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; it must be \[12\]"):
        QuantLinear(bitfold.encode(weight(), "int8"), torch.zeros(3))
