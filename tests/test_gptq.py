"""GPTQ of one matrix, held against the paper's algorithm in float64 (oracle_gptq.py)."""

from __future__ import annotations

import math

import bitfold
import numpy as np
import oracle_gptq
import pytest
import torch
from bitfold.formats import parse
from bitfold.quantizers import grid as grids
from bitfold.quantizers.gptq import GptqOptions, solve
from cases import block_formats, columns, refusal
from hypothesis import given
from hypothesis import strategies as st

INTEGERS = [
    "int8-channel",
    "int4-g32",
    "int4-g16-asym",
    "int3-g24",
    "int2-g16",
    "int2-g16-asym",
    "int4-channel-asym",
]
OTHERS = [
    "int3-tensor",
    "int8-g33-sbf16",
    "int4-g32-asym-sfp32",
    "nf4-b32",
    "fp4-b32",
    "nf4-b64-dq",
    "fp4-b33-sbf16",
]


def problem(
    rng: np.random.Generator, n: int, k: int, tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and the Hessian of inputs that hang together, some much larger than others; float32 numbers."""
    weight = rng.standard_normal((n, k)) * np.exp(rng.uniform(-1, 1, (n, 1)))
    mix = rng.standard_normal((k, k)) / math.sqrt(k) + np.eye(k)
    x = rng.standard_normal((tokens or 4 * k, k)) @ mix * np.exp(rng.uniform(-1.5, 1.5, k))
    return weight.astype(np.float32), (x.T @ x).astype(np.float32)


def levels_of(format: str) -> np.ndarray:
    """Ascending, before step and offset."""
    parsed = parse(format)
    if parsed.grid == "codebook":
        return bitfold.grids.grid(format).double().numpy()
    low = 0 if parsed.asymmetric else -(1 << parsed.bits - 1)
    return np.arange(low, low + (1 << parsed.bits), dtype=np.float64)


def steps_of(weight: np.ndarray, format: str, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Step and offset of every weight, as plain rounding chooses them or, with the importance of columns, the best of
    all shares of these: float64 [n, k] each."""
    tensor = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    encoded = bitfold.encode(tensor, format if importance is None else format.replace("-dq", "-sfp32"))
    step = bitfold.grids.scales(encoded).double().numpy()
    zeros = bitfold.grids.zeros(encoded)
    zeros = np.zeros_like(step) if zeros is None else zeros.double().numpy()
    if importance is None:
        return step, -zeros * step
    parsed, k = parse(encoded.format), weight.shape[1]
    group = parsed.group if parsed.group > 0 else k
    start = torch.from_numpy(step[:, ::group].T).float()
    tried = (start * torch.tensor(grids.SHRINK)[:, None, None]).to(encoded.unpack().scales.dtype)
    tried = tried.double().numpy()
    wide, zeros_of_groups = tensor.double().numpy(), zeros[:, ::group].T
    costs = oracle_gptq.costs(wide, tried, zeros_of_groups, levels_of(format), group, importance)
    if parsed.group == 0:  # one for the matrix
        costs = np.broadcast_to(costs.sum((1, 2), keepdims=True), costs.shape)
    best = np.take_along_axis(tried, costs.argmin(0)[None], 0)[0].T
    step = best.repeat(group, 1)[:, :k]
    if format.endswith("-dq"):
        most = torch.from_numpy(step).float()
        step = bitfold.grids.scales(bitfold.encode(tensor.clamp(-most, most), format)).double().numpy()
    return step, -zeros * step


def expected(
    weight: np.ndarray, hessian: np.ndarray, format: str, order: str, search: bool, damping: float
) -> np.ndarray:
    """The rounded weights by the oracle; groups along the order lie along it."""
    k = weight.shape[1]
    parsed = parse(format)
    columns = np.arange(k) if order == "none" else oracle_gptq.by_diagonal(hessian)
    levels = levels_of(format)
    damped = oracle_gptq.damped(hessian.astype(np.float64), damping)
    # In the order, what is left of an error that the columns after it make up for: over the mean, as in the library.
    left = oracle_gptq.left_over(damped[np.ix_(columns, columns)]) / np.diagonal(hessian).mean()
    importance = np.empty(k)
    importance[columns] = left
    fixed = steps_of(weight, format, importance if search else None)
    here: list[np.ndarray] = list(fixed)

    def round_column(column: np.ndarray, i: int, moved: np.ndarray) -> np.ndarray:
        j = columns[i]
        if order != "static" and parsed.group > 0 and parsed.scale != "nested":
            if i % parsed.group == 0:
                group = slice(i, i + parsed.group)
                here[:] = steps_of(moved[:, group], format, left[group] if search else None)
            return oracle_gptq.on_grid(here[0][:, 0], here[1][:, 0], levels, column)
        return oracle_gptq.on_grid(fixed[0][:, j], fixed[1][:, j], levels, column)

    return oracle_gptq.solve(weight, damped, columns, round_column)


def decoded(solved, k: int) -> np.ndarray:
    """The columns in their places."""
    values = solved.qtensor.decode().double().numpy()
    if solved.g_idx is None:
        return values
    back = np.empty_like(values)
    back[:, np.argsort(solved.g_idx.numpy(), kind="stable")] = values
    return back


@pytest.mark.isa
@pytest.mark.parametrize("order", ["static", "none", "groups"])
@pytest.mark.parametrize("format", INTEGERS + OTHERS)
@pytest.mark.parametrize("search", [False, True])
def test_the_result_is_that_of_the_papers_algorithm(search, format, order, device, rng):
    """Weights that lie in the middle of two levels may fall either way, and what follows in their row with them."""
    if order == "groups" and format.endswith("-dq"):
        return
    n, k, damping = 24, 83, 0.01
    weight, hessian = problem(rng, n, k)
    wanted = expected(weight, hessian, format, order, search, damping)
    solved = solve(
        torch.from_numpy(weight),
        torch.from_numpy(hessian),
        format,
        GptqOptions(damping, order=order, search=search),
    )
    got = decoded(solved, k)
    assert solved.method == "gptq"
    assert solved.note == ""
    same = np.isclose(got, wanted, rtol=1e-5, atol=1e-7).all(1)
    assert same.sum() >= n - 1, f"{n - same.sum()} rows of {n} differ"

    wide = hessian.astype(np.float64)
    whole = oracle_gptq.weighted_error(weight.astype(np.float64), wide)
    error = oracle_gptq.weighted_error(weight - got, wide) / whole
    assert solved.error == pytest.approx(error, rel=1e-3)
    plain = bitfold.encode(torch.from_numpy(weight), format).decode().double().numpy()
    rounding = oracle_gptq.weighted_error(weight - plain, wide) / whole
    assert solved.rounding_error == pytest.approx(rounding, rel=1e-3)
    assert error == pytest.approx(oracle_gptq.weighted_error(weight - wanted, wide) / whole, rel=5e-3)
    # Two bits around 0 are but three values to the left of the largest: scales that follow the errors run away.
    assert error < rounding or (format == "int2-g16" and order == "none")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 65, 97, 200])
def test_the_factor_is_that_of_float64(k, dtype, rng):
    """And what is not asked for isn't read: Hessians may be views."""
    _, hessian = problem(rng, 1, k)
    order = rng.permutation(k)
    whole = torch.zeros(2 * k, k + 1, dtype=dtype)
    view = whole[::2, 1:]
    view.copy_(torch.from_numpy(hessian))
    factor, info = torch.ops.bitfold.gptq_factor(view, torch.from_numpy(order), 2.0, 0.5)
    assert info.tolist() == [0]
    wanted = np.linalg.cholesky(hessian.astype(np.float64)[np.ix_(order, order)] / 2 + 0.5 * np.eye(k)).T
    np.testing.assert_allclose(factor.numpy(), wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())
    assert not factor.tril(-1).any()


@pytest.mark.isa
@pytest.mark.parametrize("bad", [0, 1, 40, 63, 64, 98])
def test_the_factor_names_the_column_where_it_ends(bad, rng):
    _, hessian = problem(rng, 1, 99)
    hessian[bad] = hessian[:, bad] = 0
    hessian[bad, bad] = -1e-3
    _, info = torch.ops.bitfold.gptq_factor(torch.from_numpy(hessian), torch.arange(99), 1.0, 0.0)
    assert info.tolist() == [bad + 1]


@pytest.mark.parametrize("order", ["static", "none", "groups"])
def test_any_number_of_threads_gives_the_same_bits(order, rng, threads):
    weight, hessian = map(torch.from_numpy, problem(rng, 150, 333))
    results = []
    for count in (1, 2, 5):
        threads(count)
        solved = solve(weight, hessian, "int4-g32-asym", GptqOptions(order=order))
        results.append([*solved.qtensor.planes.values(), torch.tensor([solved.error, solved.rounding_error])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("format", block_formats())
def test_blocks_keep_their_scales_and_take_other_codes(format, rng):
    """Every code in every place decodes to its level; what GPTQ writes is the paper's result on the blocks' grid."""
    n, k, damping = 12, 512, 0.01
    weight, hessian = problem(rng, n, k)
    tensor = torch.from_numpy(weight)
    diagonal = torch.from_numpy(hessian).diagonal().double()
    grid = grids.fit(tensor, format, importance=(diagonal / diagonal.mean()).float())
    group = grid.groups(torch.arange(k))
    levels = grid.table if grid.table is not None else torch.arange(grid.low, grid.high + 1.0)
    places = torch.from_numpy(rng.integers(0, len(levels), (n, k), dtype=np.uint8))
    step, offset = grid.step[group].t(), grid.offset[group].t()
    wanted = levels[places.long()] * step + offset
    torch.testing.assert_close(grid.assemble(places).decode(), wanted, rtol=0, atol=0)

    columns = oracle_gptq.by_diagonal(hessian)
    steps, offsets, values = step.double().numpy(), offset.double().numpy(), levels.double().numpy()

    def round_column(column: np.ndarray, i: int, moved: np.ndarray) -> np.ndarray:
        j = columns[i]
        return oracle_gptq.on_grid(steps[:, j], offsets[:, j], values, column)

    wide = hessian.astype(np.float64)
    wanted = oracle_gptq.solve(weight, oracle_gptq.damped(wide, damping), columns, round_column)
    solved = solve(tensor, torch.from_numpy(hessian), format)
    got = solved.qtensor.decode().double().numpy()
    same = np.isclose(got, wanted, rtol=1e-5, atol=1e-7).all(1)
    assert same.sum() >= n - 2, f"{n - same.sum()} rows of {n} differ"
    ratio = oracle_gptq.weighted_error(weight - got, wide) / oracle_gptq.weighted_error(weight - wanted, wide)
    assert ratio == pytest.approx(1, rel=5e-3)
    assert solved.error < solved.rounding_error


def test_groups_along_the_order_need_g_idx(rng):
    weight, hessian = problem(rng, 8, 70)
    solved = solve(
        torch.from_numpy(weight), torch.from_numpy(hessian), "int4-g16", GptqOptions(order="groups")
    )
    order = oracle_gptq.by_diagonal(hessian)
    assert solved.g_idx.dtype == torch.int32
    assert solved.g_idx[torch.from_numpy(order)].tolist() == [i // 16 for i in range(70)]
    assert (
        solve(
            torch.from_numpy(weight), torch.from_numpy(hessian), "int4-g128", GptqOptions(order="groups")
        ).g_idx
        is None
    )


@pytest.mark.parametrize("format", INTEGERS + OTHERS)
@pytest.mark.parametrize("search", [False, True])
def test_inputs_without_correlation_round_to_nearest(search, format, rng):
    weight = torch.from_numpy(rng.standard_normal((9, 67)).astype(np.float32))
    diagonal = torch.from_numpy(rng.uniform(0.1, 5, 67).astype(np.float32))
    solved = solve(weight, torch.diag(diagonal), format, GptqOptions(search=search))
    grid = grids.fit(weight, format, search, diagonal / diagonal.mean() + 0.01)
    places, _ = grid.round(weight.t().contiguous(), grid.groups(torch.arange(67)))
    torch.testing.assert_close(
        solved.qtensor.decode(), grid.assemble(places.t().contiguous()).decode(), rtol=0, atol=0
    )
    if search or format.endswith("-dq"):  # plain rounding chooses codes before the scales are nested
        assert solved.error <= solved.rounding_error or (search and format == "int8-channel")
        return
    plain = bitfold.encode(weight, format)
    torch.testing.assert_close(solved.qtensor.decode(), plain.decode(), rtol=0, atol=0)
    assert solved.error == pytest.approx(solved.rounding_error, rel=1e-5)


@pytest.mark.parametrize("search", [False, True])
def test_columns_without_inputs(search, rng):
    """They have no say in the scale, and take the nearest level; a group of them alone has scales of its own."""
    weight, hessian = problem(rng, 6, 64)
    dead = np.zeros(64, dtype=bool)
    dead[[3, 20]] = dead[48:] = True
    weight[:, dead] *= 50
    hessian[dead] = hessian[:, dead] = 0
    solved = solve(
        torch.from_numpy(weight), torch.from_numpy(hessian), "int4-g16", GptqOptions(search=search)
    )
    assert solved.method == "gptq"
    scales = solved.qtensor.unpack().scales
    if search:
        others = solve(
            torch.from_numpy(np.where(dead, 0.3 * weight, weight)), torch.from_numpy(hessian), "int4-g16"
        )
        assert torch.equal(scales[:, :3], others.qtensor.unpack().scales[:, :3])
        alone = grids.fit(torch.from_numpy(weight[:, 48:].copy()), "int4-g16", True)
        assert torch.equal(scales[:, 3:], alone.logical["scales"])
    else:
        quiet = np.where(dead & (np.arange(64) < 48), 0, weight).astype(np.float32)
        assert torch.equal(scales, bitfold.encode(torch.from_numpy(quiet), "int4-g16").unpack().scales)
    got = solved.qtensor.decode().numpy()
    step = scales.float().numpy().repeat(16, 1)
    nearest = np.clip(np.rint(weight / step), -8, 7) * step
    np.testing.assert_allclose(got[:, dead], nearest[:, dead], rtol=1e-6)


def test_damping_is_raised_where_the_factorisation_fails(rng):
    weight, hessian = problem(rng, 4, 48, tokens=5)  # of rank 5
    hessian -= 1e-3 * np.diag(hessian).mean() * np.eye(48, dtype=np.float32)
    solved = solve(torch.from_numpy(weight), torch.from_numpy(hessian), "int4-g16", GptqOptions(damping=1e-5))
    assert solved.method == "gptq"
    assert solved.damping == pytest.approx(1e-2)
    assert "raised from 1e-05 to 0.01" in solved.note


def test_a_hessian_without_a_factor_is_rounded_plainly(rng):
    weight, _ = problem(rng, 4, 32)
    swap = torch.ones(32, 32) * -1000
    swap.diagonal().fill_(1.0)
    for hessian, why in ((torch.zeros(32, 32), "is 0"), (swap, "no Cholesky factor")):
        solved = solve(torch.from_numpy(weight), hessian, "int4-g16")
        assert solved.method == "rtn"
        assert why in solved.note
        plain = bitfold.encode(torch.from_numpy(weight), "int4-g16")
        assert torch.equal(solved.qtensor.decode(), plain.decode())
    assert solve(torch.from_numpy(weight), torch.zeros(32, 32), "int4-g16").error == 0


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 150),
    format=st.sampled_from(INTEGERS + OTHERS + block_formats()),
    order=st.sampled_from(["static", "none", "groups"]),
    rank=st.integers(1, 200),
    spread=st.sampled_from([0, 6, 30]),
    search=st.booleans(),
    seed=st.integers(0, 99),
)
def test_whatever_comes(n, k, format, order, rank, spread, search, seed):
    """Any shape, rank and spread of inputs: a finite matrix and honest errors."""
    if format in block_formats():
        order, k = "static", columns(format) * (1 + k % 2)
    if format.endswith("-dq") and order == "groups":
        return
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
    weight[rng.integers(n)] = 0
    x = rng.standard_normal((rank, k)) * 10.0 ** rng.uniform(-spread / 2, spread / 2, k).round()
    hessian = torch.from_numpy(x.T @ x)
    solved = solve(weight, hessian, format, GptqOptions(order=order, search=search))
    got = decoded(solved, k)
    assert np.isfinite(got).all()
    assert solved.method == "gptq"
    whole = oracle_gptq.weighted_error(weight.double().numpy(), hessian.numpy())
    error = oracle_gptq.weighted_error(weight.double().numpy() - got, hessian.numpy())
    assert solved.error == pytest.approx(error / whole if whole else 0, rel=2e-2, abs=1e-6)


def test_one_column_and_none():
    one = solve(torch.tensor([[0.5], [-1.0]]), torch.tensor([[3.0]]), "int4-g16")
    torch.testing.assert_close(one.qtensor.decode(), torch.tensor([[0.5], [-1.0]]), rtol=1e-3, atol=0)
    none = solve(torch.zeros(3, 0), torch.zeros(0, 0), "int4-g16")
    assert none.qtensor.shape == (3, 0)


def test_huge_columns(rng):
    """A column of inputs a million times the others: damping, a share of the mean diagonal, drowns all but it."""
    weight, hessian = problem(rng, 8, 96)
    hessian[17] *= 1e6
    hessian[:, 17] *= 1e6
    plain, searched = (
        solve(torch.from_numpy(weight), torch.from_numpy(hessian), "int4-g32", GptqOptions(search=search))
        for search in (False, True)
    )
    assert plain.method == searched.method == "gptq"
    assert plain.error <= 1.0001 * plain.rounding_error
    assert searched.error < 0.2 * plain.error  # whose scales know nothing of it


def test_the_ops_refuse(rng):
    """What `solve` can't ask for."""
    columns, factor = torch.ops.bitfold.gptq_columns, torch.ops.bitfold.gptq_factor
    w, u, one = torch.zeros(4, 8), torch.eye(8), torch.ones(1, 4)
    order, group = torch.arange(8), torch.zeros(8, dtype=torch.int64)

    def call(
        weight=w,
        order=order,
        factor=u,
        begin=0,
        step=one,
        group=group,
        table=None,
        low=0,
        high=3,
        behind=None,
    ):
        return columns(weight, order, factor, begin, step, step, group, table, low, high, behind)

    refusal(lambda: call(weight=w.double()), "weight is a float64", "float32")
    refusal(lambda: call(weight=w.t()), "weight")
    refusal(lambda: call(order=order + 1), "order holds 8", "below 8")
    refusal(lambda: call(order=order.int()), "order is a int32", "int64")
    refusal(lambda: call(group=group + 1), "group holds 1", "below 1")
    refusal(lambda: call(begin=1), "begin is 1")
    refusal(lambda: call(factor=torch.eye(9)), "behind is None")
    refusal(lambda: call(factor=torch.eye(9), behind=torch.zeros(2, 4)), r"behind .*\[1, 4\]")
    refusal(lambda: call(step=one.t()), r"step .*\[4, 4\]")
    refusal(lambda: call(table=torch.zeros(17), high=16), "high is 16", "below 16")
    refusal(lambda: call(low=0, high=256), "256 levels")
    refusal(lambda: factor(torch.zeros(3, 4), order, 1.0, 0.0), "hessian", "square")
    refusal(lambda: factor(u, order, 0.0, 0.0), "unit is 0")
    refusal(lambda: factor(u, order, 1.0, math.nan), "damping is nan")


def test_refusals(rng):
    weight, hessian = map(torch.from_numpy, problem(rng, 4, 32))

    def with_value(i: int, j: int, value: float) -> torch.Tensor:
        changed = hessian.clone()
        changed[i, j] = value
        return changed

    refusal(lambda: solve(weight, with_value(2, 5, math.nan), "int4-g16"), r"hessian\[2, 5\] is nan")
    refusal(lambda: solve(weight, with_value(2, 5, math.inf), "int4-g16"), r"hessian\[2, 5\] is inf")
    refusal(lambda: solve(weight, with_value(7, 7, -1.0), "int4-g16"), r"hessian\[7, 7\] is -1")
    refusal(
        lambda: solve(weight, hessian[:31, :31], "int4-g16"), r"hessian .*\[31, 31\].* must be .*\[32, 32\]"
    )
    refusal(lambda: solve(weight, hessian.half(), "int4-g16"), "hessian is a torch.float16")
    refusal(lambda: solve(weight[0], hessian, "int4-g16"), "weight")
    refusal(lambda: solve(weight, hessian, "fp8"), "fp8-e4m3-channel", "integers")
    refusal(lambda: solve(weight, hessian, "bf16"), "bf16", "integers")
    refusal(lambda: solve(weight, hessian, "int5"), "int5")
    refusal(lambda: solve(weight, hessian, "nf4-b32-dq", GptqOptions(order="groups")), "order", "depend on")
    refusal(lambda: solve(weight, hessian, "q4_0", GptqOptions(order="groups")), "order", "depend on")
    refusal(lambda: solve(weight, hessian, "q4_k"), "k is 32", "256")
    odd = weight.clone()
    odd[1, 3] = math.nan
    refusal(lambda: solve(odd, hessian, "int4-g16"), r"weight\[1, 3\] is NaN")
    refusal(lambda: GptqOptions(damping=-1), "damping is -1")
    refusal(lambda: GptqOptions(order="act"), "order is 'act'", "static, none, groups")
