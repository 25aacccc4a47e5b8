"""kv_pack and kv_attention against float64 (oracle_kv.py), and what they refuse."""

from __future__ import annotations

import devices
import numpy as np
import oracle_kv as oracle
import pytest
import torch
from bitfold.kv.blocks import FORMATS, BlockFormat, value_group_of
from hypothesis import given
from hypothesis import strategies as st
from kv_numbers import paged, past, randn

ERROR = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def check(rng, format, *, batch=1, heads=2, shared=1, rows=1, blocks=3, recent=5, first=0, head=32, group=16,
          value_group=None, mask=None, page=2, dtype=torch.float32):  # fmt: skip
    """kv_attention against float64 of the decoded numbers."""
    value_group = value_group or value_group_of(format, head)
    law = BlockFormat(format, group, head, value_group)
    keys, values = past(rng, batch, heads, blocks * group + recent, head)
    keys, values = keys.to(dtype), values.to(dtype)
    query = randn(rng, batch, heads * shared, rows, head).to(dtype)
    packed = law.pack(keys[:, :, : blocks * group], values[:, :, : blocks * group])
    tokens = blocks * group - first + recent
    masks = {
        None: None,
        "bool": torch.from_numpy(rng.uniform(size=(batch, 1, rows, tokens)) < 0.7),
        "heads": torch.from_numpy(rng.uniform(size=(1, heads * shared, 1, tokens)) < 0.7),
        "float": randn(rng, batch, 1, rows, tokens).to(dtype),
        "one": randn(rng, 1, 1, 1, tokens).to(dtype),
    }
    given_mask, scale = masks[mask], head**-0.5
    exact = keys[:, :, blocks * group :], values[:, :, blocks * group :]
    got = devices.ops().kv_attention(
        query, paged(packed, page), blocks, first, *exact, format, group, value_group, given_mask, scale
    )
    old = law.unpack_anywhere(packed, torch.float32)
    whole = [torch.cat([a, b.float()], 2)[:, :, first:] for a, b in zip(old, exact, strict=True)]
    wanted = oracle.attention(query, *whole, given_mask, scale)
    error = np.linalg.norm(got.double().numpy() - wanted) / max(np.linalg.norm(wanted), 1e-30)
    assert error <= ERROR[dtype], f"{error:.3g}"
    assert got.dtype == dtype
    assert got.shape == wanted.shape


# ---- packing ----


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("head", "value_group"), [(32, 32), (64, 16), (20, 20), (1, 1), (96, 96), (128, 64)])
def test_packing_is_what_the_page_says(format, head, value_group, device, rng):
    keys, values = past(rng, 2, 3, 96, head)
    law = BlockFormat(format, 32, head, value_group)
    blocks = law.pack(keys, values)
    assert blocks.shape == (2, 3, 3, law.nbytes)
    wanted = oracle.decoded(keys.numpy(), values.numpy(), format, 32, value_group)
    for got, expected, name in zip(
        law.unpack_anywhere(blocks, torch.float32), wanted, ("keys", "values"), strict=True
    ):
        got = got.double().numpy()
        # float32 may fall to the other side of a tie, which costs a step; that is rare.
        off = np.abs(got - expected) > 1e-5 * np.abs(expected).max()
        assert off.mean() < 1e-3, f"{name}: {off.mean():.3g}"


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_writes_the_bytes_of_torchs_ops(format, device, rng):
    for head, value_group, dtype in (
        (64, 32, torch.float32),
        (20, 20, torch.bfloat16),
        (7, 7, torch.float16),
    ):
        keys, values = (x.to(dtype) for x in past(rng, 2, 2, 48, head))
        keys[0, 0, 3], keys[0, 1, :16], values[1, 0, 5] = 0, 2.5, 0
        keys[1, 1, 0, 0], values[1, 1, 17, 2], values[0, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
        law = BlockFormat(format, 16, head, value_group)
        assert torch.equal(law.pack(keys, values), law.pack_anywhere(keys, values))
        swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
        assert torch.equal(law.pack(*swapped), law.pack(keys, values)), "strides change nothing"


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_of_either_sign_are_zero(format, device, rng):
    """Steps and offsets have no -0, which the order of comparisons would choose."""
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (4, 1, 32, 32))).float()
    signs[0], signs[1] = 1, -1
    zeros = signs * 0.0
    law = BlockFormat(format, 32, 32, 32)
    assert not law.pack(zeros, zeros).any()
    assert not law.pack_anywhere(zeros, zeros).any()


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_among_those_that_share_its_step(format, device, rng):
    keys, values = past(rng, 1, 1, 32, 32)
    keys[0, 0, 3, 5], values[0, 0, 20, 4] = torch.nan, torch.inf
    law = BlockFormat(format, 16, 32, 16)
    got_keys, got_values = law.unpack_anywhere(law.pack(keys, values), torch.float32)
    bad_keys, bad_values = torch.zeros(32, 32, dtype=bool), torch.zeros(32, 32, dtype=bool)
    bad_keys[:16, 5], bad_values[20, :16] = True, True
    assert torch.equal(got_keys[0, 0].isnan(), bad_keys)
    assert torch.equal(got_values[0, 0].isnan(), bad_values)


# ---- attention ----


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mask", [None, "bool", "heads", "float", "one"])
def test_attention(format, mask, device, rng):
    check(rng, format, batch=2, shared=4, rows=3, mask=mask)
    check(rng, format, heads=1, shared=7, first=21, mask=mask, blocks=5)
    check(rng, format, blocks=0, recent=9, mask=mask)
    check(rng, format, blocks=4, recent=0, first=16, mask=mask)
    check(rng, format, group=64, blocks=40, recent=70, head=64, shared=2, mask=mask, page=8)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_of_16_bits(dtype, device, rng):
    for format in FORMATS:
        check(rng, format, shared=4, head=128, group=64, blocks=20, recent=17, dtype=dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("head", "value_group"), [(64, 64), (128, 64), (128, 128)])
def test_attention_to_blocks_of_64_tokens(format, head, value_group, device, rng):
    """Which GPUs have their own way for: chunks of one turn and of many, pages, windows, and any number of queries."""

    def of_64(**more):
        check(rng, format, head=head, value_group=value_group, group=64, **more)

    of_64(batch=2, shared=4, blocks=5, recent=3, first=70, mask="bool")
    of_64(heads=1, shared=3, rows=2, blocks=37, recent=0, first=63, page=8)
    of_64(heads=1, blocks=9, recent=17, first=64 * 8 + 1, mask="float", dtype=torch.float16)
    of_64(heads=1, shared=8, blocks=1, recent=1, mask="heads", dtype=torch.bfloat16)
    of_64(heads=100, blocks=4, recent=70)  # no room for many chunks of exact tokens
    of_64(heads=100, blocks=4, recent=70, dtype=torch.bfloat16)
    of_64(batch=2, shared=6, rows=2, blocks=1, recent=131, mask="float", dtype=torch.float16)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_exact_tokens_lie_changes_nothing(format, head, dtype, device, rng):
    """GPUs copy those that begin at multiples of 16 bytes."""
    law = BlockFormat(format, 64, head, head)
    keys, values = (x.to(dtype) for x in past(rng, 2, 2, 64 * 3 + 40, head))
    blocks, exact = law.pack(keys[:, :, :192], values[:, :, :192]), (keys[:, :, 192:], values[:, :, 192:])
    query = randn(rng, 2, 6, 1, head).to(dtype)

    def attend(keys, values):
        return devices.ops().kv_attention(query, [blocks], 3, 5, keys, values, format, 64, head, None, 0.2)

    wanted = attend(*exact)
    beside = [torch.cat([x, x], -1)[..., :head] for x in exact]
    odd = [torch.cat([x[..., :1], x], -1)[..., 1:] for x in exact]
    assert torch.equal(attend(*beside), wanted)
    for keys, values in (odd, (exact[0], odd[1])):
        assert torch.allclose(attend(keys, values).float(), wanted.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_of_any_size(format, device, rng):
    """Scores are what they are of common numbers, and so is the output over the size of values."""
    law = BlockFormat(format, 64, 64, 64)
    keys, values = past(rng, 1, 1, 192, 64)
    query, none = randn(rng, 1, 2, 1, 64), torch.empty(1, 1, 0, 64)
    sizes = torch.from_numpy(np.exp2(rng.integers(-20, 20, 64)).astype("f4"))
    results = []
    for q, k, v in ((1.0, 1.0, 1.0), (1 / sizes, sizes, 2.0**-60), (2.0**60, 2.0**-60, 2.0**60)):
        blocks = law.pack(keys * k, values * v)
        out = devices.ops().kv_attention(query * q, [blocks], 3, 7, none, none, format, 64, 64, None, 0.3)
        results.append(out / v)
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-5, atol=1e-5)


@given(
    format=st.sampled_from(FORMATS),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    shared=st.integers(1, 9),
    rows=st.integers(1, 8),
    head=st.sampled_from([1, 3, 8, 16, 20, 40, 64, 80, 112]),
    group=st.sampled_from([16, 32, 48]),
    blocks=st.integers(0, 5),
    recent=st.integers(0, 40),
    cut=st.floats(0, 1),
    mask=st.sampled_from([None, "bool", "heads", "float", "one"]),
    page=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_whatever_comes(
    device, format, batch, heads, shared, rows, head, group, blocks, recent, cut, mask, page, seed
):
    tokens = blocks * group
    first = min(int(cut * tokens), tokens + recent - 1)
    if tokens + recent == 0:
        recent, first = 1, 0
    check(np.random.default_rng(seed), format, batch=batch, heads=heads, shared=shared, rows=rows, head=head,
          group=group, blocks=blocks, recent=recent, first=max(0, first), mask=mask, page=page)  # fmt: skip


def case(rng, *, tokens: int = 2500, head: int = 64):
    law = BlockFormat("int8", 64, head, head)
    keys, values = past(rng, 2, 2, tokens, head)
    packed = tokens // 64 * 64 - 64
    blocks = law.pack(keys[:, :, :packed], values[:, :, :packed])
    return [randn(rng, 2, 8, 2, head), [blocks], packed // 64, 70, keys[:, :, packed:], values[:, :, packed:],
            "int8", 64, head, None, 0.1]  # fmt: skip


def test_any_number_of_threads_gives_the_same_bits(rng, threads):
    arguments = case(rng)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(devices.ops().kv_attention(*arguments))
        results.append(devices.ops().kv_attention(*arguments))
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_a_row_that_sees_nothing_is_0_and_nan_stays_in_its_row(device, rng):
    arguments = case(rng, tokens=200)
    tokens = arguments[2] * 64 - arguments[3] + arguments[4].shape[2]
    mask = torch.ones(2, 1, 2, tokens, dtype=torch.bool)
    mask[0, :, 1] = False
    arguments[9] = mask
    arguments[0][1, 3, 0, 0] = torch.nan
    out = devices.ops().kv_attention(*arguments)
    assert not out[0, 1].any()
    wanted = torch.zeros(2, 2, 8, dtype=bool)
    wanted[1, 0, 3] = True
    assert torch.equal(out.isnan().all(-1), wanted)
    assert torch.equal(out.isnan().any(-1), wanted)


def test_what_left_the_window_is_of_no_account(device, rng):
    keys, values = past(rng, 1, 1, 96, 16)
    keys[0, 0, 3, 2] = values[0, 0, 35] = torch.nan
    law = BlockFormat("int8", 32, 16, 16)
    query, none = randn(rng, 1, 4, 1, 16), torch.empty(1, 1, 0, 16)
    out = devices.ops().kv_attention(
        query, [law.pack(keys, values)], 3, 40, none, none, "int8", 32, 16, None, 0.3
    )
    assert out.isfinite().all()
    keys, values = past(rng, 1, 1, 192, 64)
    keys[0, 0, 3, 2] = values[0, 0, 70, 1] = torch.nan
    values[0, 0, 71, 5] = torch.inf
    query, none = randn(rng, 1, 4, 1, 64), torch.empty(1, 1, 0, 64)
    for format in FORMATS:
        blocks = BlockFormat(format, 64, 64, 64).pack(keys, values)
        out = devices.ops().kv_attention(query, [blocks], 3, 72, none, none, format, 64, 64, None, 0.3)
        assert out.isfinite().all()


def test_masks_of_the_lowest_number_and_huge_scores(device, rng):
    arguments = case(rng, tokens=200)
    tokens = arguments[2] * 64 - arguments[3] + arguments[4].shape[2]
    hidden = torch.zeros(1, 1, 2, tokens)
    hidden[..., :50] = torch.finfo(torch.float32).min
    seen = torch.ones(1, 1, 2, tokens, dtype=torch.bool)
    seen[..., :50] = False
    arguments[10] = 30.0
    with_number, with_bool = (
        devices.ops().kv_attention(*arguments[:9], mask, arguments[10]) for mask in (hidden, seen)
    )
    assert torch.equal(with_number, with_bool)
    assert with_bool.isfinite().all()


def test_torch_knows_the_ops(rng):
    arguments = case(rng, tokens=200)
    torch.library.opcheck(torch.ops.bitfold.kv_attention.default, tuple(arguments))
    keys, values = past(rng, 1, 2, 32, 16)
    torch.library.opcheck(torch.ops.bitfold.kv_pack.default, (keys, values, "int4", 16, 16))
    compiled = torch.compile(lambda *a: torch.ops.bitfold.kv_attention(*a) * 2, fullgraph=True)
    assert torch.equal(compiled(*arguments), torch.ops.bitfold.kv_attention(*arguments) * 2)


def test_nothing_to_do(device, rng):
    keys = torch.empty(0, 2, 32, 16)
    assert devices.ops().kv_pack(keys, keys, "int8", 16, 16).shape[:3] == (0, 2, 2)
    empty = torch.empty(0, 4, 1, 16)
    out = devices.ops().kv_attention(empty, [], 0, 0, keys, keys, "int8", 16, 16, None, 1.0)
    assert out.shape == (0, 1, 4, 16)
    none = torch.empty(1, 2, 0, 16)
    out = devices.ops().kv_attention(torch.ones(1, 4, 1, 16), [], 0, 0, none, none, "int8", 16, 16, None, 1.0)
    assert not out.any()


def test_the_ops_refuse(device, rng):
    def refuses(sentence: str, op, *arguments):
        with pytest.raises(ValueError, match=sentence):
            op(*arguments)

    pack, attend = devices.ops().kv_pack, devices.ops().kv_attention
    keys, values = past(rng, 1, 2, 32, 16)
    refuses("'int7'; it must be one of int8, fp8, int4", pack, keys, values, "int7", 16, 16)
    refuses("group is 17; it must be a multiple of 16", pack, keys, values, "int8", 17, 16)
    refuses("value_group is 5; it must be the head size, 16", pack, keys, values, "int8", 16, 5)
    refuses("whole groups of 64", pack, keys, values, "int8", 64, 16)
    refuses("float64", pack, keys.double(), values.double(), "int8", 16, 16)
    refuses(r"values .*\[1, 2, 32, 16\] like keys", pack, keys, values[:, :1], "int8", 16, 16)
    refuses("four dimensions", pack, keys[0], values[0], "int8", 16, 16)
    good = case(rng, tokens=200)

    def changed(place: int, value):
        return [*good[:place], value, *good[place + 1 :]]

    refuses("query .*multiple of key heads", attend, *changed(0, good[0][:, :3]))
    refuses("at most 64", attend, *changed(0, torch.ones(2, 8, 65, 64)))
    refuses(r"pages\[0\] .* must be a contiguous uint8", attend, *changed(1, [good[1][0][..., 1:]]))
    refuses("blocks is 9; it must be between 0 and the 2", attend, *changed(2, 9))
    refuses("first is -1", attend, *changed(3, -1))
    refuses("first is 129; it must be between 0 and the 128", attend, *changed(3, 129))
    refuses(r"mask has shape \[1, 1, 1, 3\]", attend, *changed(9, torch.ones(1, 1, 1, 3)))
    refuses("scale is nan", attend, *changed(10, float("nan")))
