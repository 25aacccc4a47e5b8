"""kv_unpack: packed and exact tokens as tensors, against float64 and against torch's own ops, whose bits it gives."""

from __future__ import annotations

import devices
import numpy as np
import oracle_kv as oracle
import pytest
import torch
from bitfold.kv.blocks import FORMATS, BlockFormat, value_group_of
from bitfold.kv.store import Store
from hypothesis import given
from hypothesis import strategies as st
from kv_numbers import paged, past
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a step of the dtype, of a number; code * step + offset has lost some of float32's before, of its parts.
NEAR = {torch.float32: 0.0, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    words = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    return got.dtype == wanted.dtype and torch.equal(got.view(words), wanted.view(words))


def check(rng, format, *, batch=1, heads=2, blocks=3, first=0, exact=(5,), head=32, group=16, value_group=None,
          page=2, dtype=torch.float32):  # fmt: skip
    law = BlockFormat(format, group, head, value_group or value_group_of(format, head))
    packed = law.pack(*past(rng, batch, heads, blocks * group, head))
    new = [[x.to(dtype) for x in past(rng, batch, heads, count, head)] for count in exact]
    keys, values = ([each[i] for each in new] for i in range(2))
    got = devices.ops().kv_unpack(
        paged(packed, page), blocks, first, keys, values, format, group, law.value_group
    )
    old = law.unpack_anywhere(packed, dtype)
    for mine, theirs, more in zip(got, old, (keys, values), strict=True):
        assert mine.is_contiguous()
        assert same_bits(mine, torch.cat([theirs[:, :, first:], *more], 2))


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_torchs_ops(format, dtype, device, rng):
    check(rng, format, dtype=dtype, batch=2, heads=3, blocks=5, first=21, exact=(3, 0, 9))
    check(rng, format, dtype=dtype, head=128, group=64, blocks=11, page=8, exact=(70,))
    check(rng, format, dtype=dtype, head=96, value_group=16, group=48, first=48)
    check(rng, format, dtype=dtype, blocks=2, first=32)  # no packed token counts
    for head in (1, 7, 20, 40, 80):
        check(rng, format, dtype=dtype, head=head, blocks=2, first=5)


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
def test_codes_times_steps(format, device, rng):
    """Against float64, which reads the blocks by itself."""
    for head, value_group, dtype in (
        (32, 16, torch.float32),
        (20, 20, torch.bfloat16),
        (64, 64, torch.float16),
    ):
        law = BlockFormat(format, 32, head, value_group)
        packed = law.pack(*past(rng, 1, 2, 64, head))
        none = [torch.empty(1, 2, 0, head, dtype=dtype)]
        got = devices.ops().kv_unpack([packed], 2, 0, none, none, format, 32, value_group)
        for h in range(2):
            wanted = [
                oracle.unpacked(packed[0, h, b].numpy(), law.law, format, 32, head, value_group)
                for b in range(2)
            ]
            for i in range(2):
                expected = np.concatenate([each[i] for each in wanted])
                error = np.abs(got[i][0, h].double().numpy() - expected)
                parts = np.abs(expected).max(0 if i == 0 else 1, keepdims=True)
                assert (error <= NEAR[dtype] * np.abs(expected) + 2**-22 * parts).all(), format


@given(
    format=st.sampled_from(FORMATS),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head=st.sampled_from([1, 3, 8, 16, 20, 40, 64, 80, 112]),
    group=st.sampled_from([16, 32, 48]),
    blocks=st.integers(0, 5),
    cut=st.floats(0, 1),
    exact=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    page=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_whatever_comes(device, format, batch, heads, head, group, blocks, cut, exact, page, dtype, seed):
    check(np.random.default_rng(seed), format, batch=batch, heads=heads, head=head, group=group, blocks=blocks,
          first=int(cut * blocks * group), exact=exact, page=page, dtype=dtype)  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_that_go_past_the_caches(dtype, rng):
    for _ in range(2):  # on new pages, and then on those that the first left
        check(
            rng, "int8", dtype=dtype, heads=5, head=48, group=32, blocks=160, page=8, first=37, exact=(70, 9)
        )
    check(rng, "int4", dtype=dtype, heads=3, head=81, group=16, blocks=300, page=8, first=1)


def test_more_pages_than_a_launch_has(device, rng):
    check(rng, "fp8", heads=1, head=16, blocks=201, page=1, first=16 * 3 + 7, exact=(1,))


def test_any_number_of_threads_gives_the_same_bits(rng, threads):
    law = BlockFormat("int4", 64, 64, 64)
    keys, values = past(rng, 2, 3, 2500, 64)
    packed = law.pack(keys[:, :, :2496], values[:, :, :2496])
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(law.unpack([packed], 39, 70, [keys[:, :, 2496:]], [values[:, :, 2496:]]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_strides_change_nothing(device, rng):
    law = BlockFormat("int8", 16, 24, 24)
    keys, values = past(rng, 2, 3, 45, 24)
    pages = [law.pack(keys[:, :, :32], values[:, :, :32])]
    wanted = law.unpack(pages, 2, 3, [keys[:, :, 32:]], [values[:, :, 32:]])
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], -1)[..., 1],
    ):
        exact = [change(x)[:, :, 32:] for x in (keys, values)]
        assert all(map(torch.equal, law.unpack(pages, 2, 3, exact[:1], exact[1:]), wanted))


def test_what_is_not_finite_stays_among_those_that_share_its_step(device, rng):
    for format in FORMATS:
        law = BlockFormat(format, 16, 32, 16)
        keys, values = past(rng, 1, 1, 32, 32)
        keys[0, 0, 3, 5], values[0, 0, 20, 4] = torch.nan, torch.inf
        packed = law.pack(keys, values)
        keys[0, 0, 31, 1], values[0, 0, 31, 2] = torch.inf, torch.nan  # exact ones are what they are
        got = law.unpack([packed], 2, 0, [keys[:, :, 31:]], [values[:, :, 31:]])
        bad_keys, bad_values = torch.zeros(33, 32, dtype=bool), torch.zeros(33, 32, dtype=bool)
        bad_keys[:16, 5], bad_values[20, :16], bad_values[32, 2] = True, True, True
        assert torch.equal(got[0][0, 0].isnan(), bad_keys)
        assert torch.equal(got[1][0, 0].isnan(), bad_values)
        assert got[0][0, 0, 32, 1] == torch.inf


def test_steps_and_numbers_at_the_ends_of_the_range(device, rng):
    """Subnormal steps and numbers, and ranges near the largest float: the bits of torch's ops there too."""
    for format in FORMATS:
        law = BlockFormat(format, 16, 32, 32)
        keys, values = past(rng, 1, 1, 64, 32)
        sizes = torch.tensor([1e-44, 1e-40, 1e-38, 1e37]).repeat_interleave(16)[:, None]
        packed = law.pack(keys * sizes, values * sizes)
        for dtype in DTYPES:
            none = [torch.empty(1, 1, 0, 32, dtype=dtype)]
            got = law.unpack([packed], 4, 0, none, none)
            assert all(map(same_bits, got, law.unpack_anywhere(packed, dtype)))


def test_gradients_are_those_of_exact_tokens(device, rng):
    law = BlockFormat("int8", 16, 8, 8)
    pages = [law.pack(*past(rng, 1, 2, 32, 8))]
    leaves = [x.requires_grad_() for count in (3, 4) for x in past(rng, 1, 2, count, 8)]
    keys, values = law.unpack(pages, 2, 5, leaves[0::2], leaves[1::2])
    given = past(rng, 1, 2, 34, 8)
    ((keys * given[0]).sum() + (values * given[1]).sum()).backward()
    for leaf, whole, at in zip(leaves, given * 2, (27, 27, 30, 30), strict=True):
        assert torch.equal(leaf.grad, whole[:, :, at : at + leaf.shape[2]])


def test_torch_knows_the_op(rng):
    law = BlockFormat("fp8", 16, 24, 24)
    pages = paged(law.pack(*past(rng, 2, 2, 64, 24)), 3)
    new = [past(rng, 2, 2, count, 24) for count in (5, 1)]
    arguments = (pages, 4, 18, [x[0] for x in new], [x[1] for x in new], "fp8", 16, 24)
    torch.library.opcheck(torch.ops.bitfold.kv_unpack.default, arguments)
    compiled = torch.compile(lambda *a: torch.ops.bitfold.kv_unpack(*a)[1] * 2, fullgraph=True)
    assert torch.equal(compiled(*arguments), torch.ops.bitfold.kv_unpack(*arguments)[1] * 2)


def test_nothing_to_do(device, rng):
    for shape in ((0, 2, 3, 16), (2, 0, 3, 16), (1, 2, 0, 16)):
        none = [torch.ones(shape)]
        for tensor in devices.ops().kv_unpack([], 0, 0, none, none, "int8", 16, 16):
            assert torch.equal(tensor, none[0])


def test_the_op_refuses(device, rng):
    law = BlockFormat("int8", 16, 16, 16)
    keys, values = past(rng, 1, 2, 32, 16)
    pages = [law.pack(keys, values)]
    exact = [keys[:, :, :3]]

    def refuses(
        sentence: str, pages=pages, blocks=2, first=0, keys=exact, values=exact, format="int8", group=16
    ):
        with pytest.raises(ValueError, match=sentence):
            devices.ops().kv_unpack(pages, blocks, first, keys, values, format, group, 16)

    refuses("keys are 0 tensors and values 1; they must be equally many, and at least one", keys=[])
    refuses("keys are 1 tensors and values 2", values=exact * 2)
    refuses(r"keys\[0\] has shape .*; it must have four dimensions", keys=[exact[0][0]])
    refuses(
        r"keys\[1\] is a bfloat16 .*as keys\[0\], a float32",
        keys=[*exact, exact[0].bfloat16()],
        values=exact * 2,
    )
    refuses(
        r"keys\[1\] .* of shape \[1, 1, 3, 16\]; in all but the tokens",
        keys=[*exact, exact[0][:, :1]],
        values=exact * 2,
    )
    refuses(r"values\[0\] is a float32 of shape \[1, 2, 2, 16\].* like keys\[0\]", values=[values[:, :, :2]])
    refuses(r"keys\[0\] is float64", keys=[exact[0].double()], values=[exact[0].double()])
    refuses("'int3'; it must be one of", format="int3")
    refuses("group is 24; it must be a multiple of 16", group=24)
    refuses(r"pages\[0\] .* must be a contiguous uint8", pages=[pages[0][..., 1:]])
    refuses("blocks is 3; it must be between 0 and the 2", blocks=3)
    refuses("first is 33; it must be between 0 and the 32", first=33)
    refuses("first is -1", first=-1)


@pytest.mark.parametrize("native", [True, False])
def test_a_store_decodes_as_many_tokens_as_are_asked_for(native, rng, monkeypatch):
    """The latest ones, packed or not, and those that come behind them; with kernels and without."""
    monkeypatch.setattr(BlockFormat, "_native", staticmethod(lambda x: native))
    blocks = BlockFormat("int8", 16, 20, 20)
    keys, values = (x.bfloat16() for x in past(rng, 2, 2, 300, 20))
    more = past(rng, 2, 2, 3, 20)
    store = Store.like(blocks, 8, keys)
    store.append_prompt(keys, values)
    store.forget(21)
    whole = store.decode()
    packed = store.packed * 16 - store.begin
    assert whole[0].shape[2] == store.tokens == 279
    for i, given_numbers in enumerate((keys, values)):
        assert torch.equal(whole[i][:, :, packed:], given_numbers[:, :, 21 + packed :])
    for count in (0, 1, store.recent, store.recent + 1, 100, 279):
        for then in ((), more):
            got = store.decode(count, *then)
            for i in range(2):
                wanted = [whole[i][:, :, 279 - count :], *(x.bfloat16() for x in then[i : i + 1])]
                assert torch.equal(got[i], torch.cat(wanted, 2))
