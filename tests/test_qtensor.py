"""QTensor as data: sizes, checks, moves, copies, pytree; pack and unpack; what the functions refuse."""

import copy
import math
import pickle

import bitfold
import numpy as np
import oracle
import pytest
import torch
from bitfold import formats
from cases import plane_families
from torch.utils import _pytree

VARIANTS = [
    *(row["default"] for row in plane_families()),
    "int4-g16-asym-sfp32",
    "int3-tensor-asym",
    "int8-channel-sbf16",
    "fp8-e4m3-g32",
    "nf4-b32-dq",
    "fp4-b64-dq",
]
N, K = 5, 83  # a ragged last group in every variant that has groups


def weight(n=N, k=K):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def assert_same_planes(a, b):
    assert list(a.planes) == list(b.planes)
    for name, plane in a.planes.items():
        other = b.planes[name]
        assert plane.dtype == other.dtype
        assert torch.equal(plane, other)


@pytest.fixture(params=VARIANTS)
def qtensor(request):
    return bitfold.encode(weight(), request.param)


# ---- formats ----


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("layout", formats.LAYOUTS)
def test_sizes_follow_the_specification(text, layout):
    for n, k in ((5, 83), (1, 1), (64, 128), (0, 7), (3, 0)):
        expected = oracle.plane_shapes(text, n, k, layout)
        assert formats.plane_shapes(text, n, k, layout) == {
            name: shape for name, (_, shape) in expected.items()
        }
        size = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
        bytes_ = sum(size[dtype] * math.prod(shape) for dtype, shape in expected.values())
        assert formats.stored_bytes(text, n, k, layout) == bytes_
    assert {law.name: str(law.dtype) for law in formats.parse(text).planes} == {
        name: f"torch.{dtype}" for name, (dtype, _) in oracle.plane_shapes(text, 1, 1).items()
    }


def test_families_and_defaults():
    assert [row["family"] for row in plane_families()] == list(oracle.FAMILIES)
    for family, format in bitfold.FORMATS.items():
        assert formats.parse(family) == format
        if format.grid != "block":
            assert str(format) == oracle.parse(family).canonical
    assert formats.parse("fp8").canonical == "fp8-e4m3-channel"


def test_unknown_format_suggests_one():
    with pytest.raises(ValueError, match=r"'int44' is unknown: did you mean 'int4'"):
        bitfold.encode(weight(), "int44")


# ---- data ----


def test_properties(qtensor):
    assert qtensor.shape == (N, K)
    assert qtensor.layout == "rows"
    assert qtensor.device == torch.device("cpu")
    assert qtensor.nbytes == sum(plane.nbytes for plane in qtensor.planes.values())
    assert qtensor.nbytes == oracle.stored_bytes(qtensor.format, N, K)
    assert qtensor.bits_per_weight == pytest.approx(8 * qtensor.nbytes / (N * K))
    text = repr(qtensor)
    assert "\n" not in text
    assert len(text) < 110
    assert repr(qtensor.format) in text
    assert f"{N}x{K}" in text


def test_short_format_names_and_plane_order_become_canonical():
    planes = bitfold.encode(weight(), "int4-g128-asym").planes
    qtensor = bitfold.QTensor("int4-asym", [N, K], dict(reversed(planes.items())))
    assert qtensor.format == "int4-g128-asym"
    assert qtensor.shape == (N, K)
    assert list(qtensor.planes) == ["codes", "scales", "zeros"]


def test_is_frozen(qtensor):
    with pytest.raises(AttributeError):
        qtensor.layout = "flat"


def test_empty_matrix():
    for n, k in ((0, 7), (3, 0)):
        qtensor = bitfold.encode(torch.empty(n, k), "int4-g128")
        assert qtensor.decode().shape == (n, k)
        assert qtensor.bits_per_weight >= 0


def test_copies_are_equal_and_apart(qtensor):
    for twin in (copy.deepcopy(qtensor), pickle.loads(pickle.dumps(qtensor))):
        assert (twin.format, twin.shape, twin.layout) == (qtensor.format, qtensor.shape, qtensor.layout)
        assert_same_planes(qtensor, twin)
        assert twin.planes["codes"].data_ptr() != qtensor.planes["codes"].data_ptr()


def test_to_moves_every_plane(qtensor):
    away = qtensor.to("meta")
    assert away.device.type == "meta"
    assert [plane.dtype for plane in away.planes.values()] == [p.dtype for p in qtensor.planes.values()]
    assert away.nbytes == qtensor.nbytes
    assert away.decode(torch.float16).shape == (N, K)


def test_pytree(qtensor):
    leaves, spec = _pytree.tree_flatten({"w": qtensor})
    assert len(leaves) == len(qtensor.planes)
    back = _pytree.tree_unflatten(leaves, spec)["w"]
    assert isinstance(back, bitfold.QTensor)
    assert_same_planes(qtensor, back)
    shapes = _pytree.tree_map(lambda plane: plane.shape, qtensor)
    assert shapes.planes["codes"] == qtensor.planes["codes"].shape
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_decode_dtypes(dtype):
    qtensor = bitfold.encode(weight(), "int4-g32")
    assert torch.equal(qtensor.decode(dtype), qtensor.decode().to(dtype))


# ---- checks ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("scales"), "planes are codes, zeros; for int4-g128-asym they must be codes, scales"),
        (lambda p: p.update(extra=p["codes"]), "planes are .*extra"),
        (lambda p: p.update(scales=p["scales"].float()), "plane scales is torch.float32; .* torch.float16"),
        (lambda p: p.update(codes=p["codes"][:, 1:]), r"plane codes has shape \[5, 41\]; .* \[5, 42\]"),
        (lambda p: p.update(zeros=p["zeros"].to("meta")), "plane zeros is on meta; it must be on cpu"),
    ],
)
def test_wrong_planes_are_named(change, message):
    planes = dict(bitfold.encode(weight(), "int4-g128-asym").planes)
    change(planes)
    with pytest.raises(ValueError, match=message):
        bitfold.QTensor("int4-g128-asym", (N, K), planes)


def test_wrong_layout():
    with pytest.raises(ValueError, match="layout is 'tiles'"):
        bitfold.QTensor("nf4", (N, K), bitfold.encode(weight(), "nf4").planes, "tiles")


# ---- encode, pack ----


def test_importance_is_refused():
    with pytest.raises(ValueError, match="importance"):
        bitfold.encode(weight(), "nf4", importance=torch.ones(K))


def test_encode_takes_parameters_and_strides():
    source = torch.nn.Parameter(weight(K, N))
    qtensor = bitfold.encode(source.T, "int8")
    assert not any(plane.requires_grad for plane in qtensor.planes.values())
    assert_same_planes(qtensor, bitfold.encode(source.detach().T.contiguous(), "int8"))


def test_encode_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"weight is a ndarray; it must be a torch\.Tensor"):
        bitfold.encode(np.ones((4, 32)), "int4-g32")
    with pytest.raises(ValueError, match="weight"):
        bitfold.encode(torch.zeros(2, 3, 4), "int8")


def test_nested_offset_is_taken():
    source = weight(64, 256)
    given = bitfold.encode(source, "nf4-b64-dq", nested_offset=0.5)
    assert given.planes["nested_offset"].tolist() == [0.5]
    same = bitfold.encode(source, "nf4-b64-dq", nested_offset=torch.tensor([0.5]))
    assert_same_planes(given, same)


def test_clamp():
    source = torch.tensor([[1e5, -1e5, 1.0]])
    with pytest.raises(ValueError, match=r"fp16|CastOverflow"):
        bitfold.encode(source, "fp16")
    assert bitfold.encode(source, "fp16", clamp=True).decode().tolist() == [[65504.0, -65504.0, 1.0]]


def test_unpack_has_what_the_format_has(qtensor):
    unpacked = qtensor.unpack()
    format = formats.parse(qtensor.format)
    assert unpacked.codes.shape == (N, K)
    names = {law.name for law in format.planes}
    for name, plane in unpacked._asdict().items():
        assert (plane is not None) == (name in names)
    if format.asymmetric:
        assert unpacked.zeros.shape == unpacked.scales.shape
    if format.grid != "cast":
        assert unpacked.codes.dtype == torch.uint8
        assert int(unpacked.codes.max()) < 2**format.bits


def test_pack_inverts_unpack(qtensor):
    packed = bitfold.pack(**qtensor.unpack()._asdict(), format=qtensor.format)
    assert packed.format == qtensor.format
    assert_same_planes(qtensor, packed)


@pytest.mark.parametrize("text", ["nf4-b32", "nf4-b32-dq", "fp4-b64"])
def test_flat_layout(text):
    source = weight()
    rows = bitfold.encode(source.reshape(1, -1), text)
    flat = bitfold.QTensor(text, (N, K), rows.planes, "flat")
    assert "flat" in repr(flat)
    assert torch.equal(flat.decode(), rows.decode().reshape(N, K))
    unpacked = flat.unpack()
    assert unpacked.codes.shape == (N, K)
    assert_same_planes(flat, bitfold.pack(**unpacked._asdict(), format=text, layout="flat"))
    x = weight(3, K)
    torch.testing.assert_close(bitfold.linear(x, flat), x @ flat.decode().T, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([4, 0])
    assert torch.equal(bitfold.embedding(ids, flat), flat.decode()[ids])
    assert_same_planes(flat, copy.deepcopy(flat))
    assert flat.to("meta").layout == "flat"


# ---- torch.compile ----


def test_functions_compile_whole_and_once():
    def everything(w, x):
        qtensor = bitfold.encode(w, "int4-g16-asym").to("cpu")
        again = bitfold.pack(**qtensor.unpack()._asdict(), format="int4-g16-asym")
        ids = torch.arange(w.shape[0])
        return bitfold.linear(x, qtensor), again.decode() - bitfold.embedding(ids, qtensor)

    everything(weight(), weight(2))  # a format's first parse is a call of C++, which breaks the graph
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m, n, k in ((3, 24, 112), (7, 9, 83), (5, 33, 200)):
            w, x = weight(n, k), weight(m, k)
            y, zero = compiled(w, x)
            torch.testing.assert_close(y, everything(w, x)[0])
            assert not zero.any()


@pytest.mark.parametrize("text", ["int4-g16-asym", "nf4-b32-dq"])
def test_linear_compiles_once_for_all_sizes(text):
    torch._dynamo.reset()
    compiled = torch.compile(bitfold.linear, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m, n, k in ((3, 24, 112), (7, 19, 83), (11, 36, 200)):
            qtensor, x = bitfold.encode(weight(n, k), text), weight(m, k)
            torch.testing.assert_close(compiled(x, qtensor), bitfold.linear(x, qtensor))


# ---- plan ----


def test_plan():
    plan = bitfold.plan_linear("int4", 1, 256, 256)
    assert plan.regime in ("fused", "tiled", "floor")
    assert plan.isa
    assert bitfold.plan_linear("int4", 1, 256, 256, torch.float64).regime == "floor"
    assert bitfold.plan_linear("nf4", 1, 256, 256, layout="flat").regime == "floor"
    with pytest.raises(ValueError, match="device is 'meta'"):
        bitfold.plan_linear("int4", 1, 256, 256, device="meta")
