"""The search for the steps of groups, held against all steps in float64 (oracle_gptq.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import bitfold
import devices
import numpy as np
import oracle_gptq
import pytest
import torch
from bitfold.quantizers import grid as grids
from cases import refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

FORMATS = ["int4-g32", "int8-g16", "int3-g24-asym", "int2-g16", "int2-g17-asym-sbf16", "int4-channel-sfp32",
           "int4-channel-asym", "nf4-b32", "fp4-b33-sbf16", "nf4-b33-sfp32", "int4-tensor", "int3-tensor-asym",
           "nf4-b64-dq", "fp4-b32-dq"]  # fmt: skip
FACTORS = [1.0, 0.93, 0.8, 0.7071, 0.5, 0.31]
STORED = [torch.float16, torch.bfloat16, torch.float32]


@dataclass
class Problem:
    """What `search_steps` is given, and the levels in float64."""

    weight: Tensor
    group: int
    start: Tensor
    factors: Tensor
    stored: torch.dtype
    zeros: Tensor | None
    importance: Tensor | None
    table: Tensor | None
    low: int
    high: int

    def call(self) -> list[Tensor]:
        return devices.ops().search_steps(*vars(self).values())

    def levels(self) -> np.ndarray:
        return np.arange(self.low, self.high + 1.0) if self.table is None else self.table.double().numpy()

    def tried(self) -> np.ndarray:
        """Every step: float64 [tried, groups, n]."""
        exact = self.start * self.factors[:, None, None]
        return exact.to(self.stored).double().numpy()

    def costs(self) -> np.ndarray:
        k = self.weight.shape[1]
        zeros = np.zeros(self.start.shape) if self.zeros is None else self.zeros.double().numpy()
        importance = np.ones(k) if self.importance is None else self.importance.double().numpy()
        wide = self.weight.double().numpy()
        return oracle_gptq.costs(wide, self.tried(), zeros, self.levels(), self.group, importance)

    def slack(self, costs: np.ndarray) -> np.ndarray:
        """How far float32 may be from `costs`, the sums of importance * |e|^3 in units of the start's cube: each e by
        a few roundings of numbers as large as the weight (Minkowski's inequality), each sum by one for each column."""
        k = self.weight.shape[1]
        importance = np.ones(k) if self.importance is None else self.importance.double().numpy()
        start, wide = self.start.double().numpy(), np.abs(self.weight.double().numpy())
        moved = np.zeros(start.shape)
        for column in range(k):
            g = column // self.group
            size = wide[:, column] / np.where(start[g] == 0, 1.0, start[g]) + max(-self.low, self.high)
            moved[g] += importance[column] * (2.0**-22 * size) ** 3
        return (np.cbrt(costs) + np.cbrt(moved)) ** 3 - costs + costs * min(k, self.group) * 2.0**-22


def check(problem: Problem) -> None:
    """Each step is one of those tried, with a cost that float64 confirms and none of them beats."""
    step, cost = (tensor.double().numpy() for tensor in problem.call())
    tried, costs = problem.tried(), problem.costs()
    start = problem.start.double().numpy()
    cubes = np.where(start == 0, 1.0, start) ** 3
    places = (tried == step).argmax(0)
    assert (np.take_along_axis(tried, places[None], 0)[0] == step).all()
    found = np.take_along_axis(costs, places[None], 0)[0] / cubes
    least = costs.min(0) / cubes
    live = start != 0
    slack = problem.slack(found)
    assert (np.abs(cost - found)[live] <= slack[live]).all()
    assert (found[live] <= (least + 2 * slack)[live]).all()
    # The first of those that are equal: exactly so where there is nothing to weigh.
    nothing = live & (costs.max(0) == 0)
    np.testing.assert_array_equal(step[nothing], tried[0][nothing])
    assert (step[~live] == 0).all()
    assert (cost[~live] == 0).all()


def of_format(weight: Tensor, format: str, importance: Tensor | None = None) -> Problem:
    """The search from the scales of plain rounding."""
    grid = grids.of(bitfold.encode(weight, format))
    zeros = grid.logical.get("zeros")
    if zeros is not None:
        zeros = zeros.t().float().expand(-1, grid.n).contiguous()
    stored = grid.logical["scales"].dtype
    factors = torch.tensor(FACTORS)
    width = grid.width or grid.k
    return Problem(
        weight, width, grid.step, factors, stored, zeros, importance, grid.table, grid.low, grid.high
    )


@pytest.mark.isa
@pytest.mark.parametrize("format", [name for name in FORMATS if not name.endswith("-dq")])
@pytest.mark.parametrize("shape", [(1, 1), (5, 83), (33, 129), (70, 300)])
def test_no_other_step_costs_less(format, shape, device, rng):
    n, k = shape
    weight = torch.from_numpy((rng.standard_normal((n, k)) * np.exp(rng.uniform(-2, 2, (n, 1)))).astype("f4"))
    weight[n // 2, : k // 2] = 0
    weight[:, k // 3] *= 20
    check(of_format(weight, format))
    importance = torch.from_numpy(rng.uniform(0, 2, k).astype("f4") ** 4)
    importance[:: max(1, k // 5)] = 0
    check(of_format(weight, format, importance))


@pytest.mark.isa
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    group=st.integers(1, 80),
    stored=st.sampled_from(STORED),
    size=st.sampled_from([-30, -6, 0, 4, 30]),
    levels=st.sampled_from([(-8, 7), (-128, 127), (-2, 1), (0, 15), (0, 3), "table", "one"]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_whatever_comes(n, k, group, stored, size, levels, weighted, seed):
    """Groups of any width, weights of any size that has a scale, dead columns, groups of zeros, heavy tails."""
    rng = np.random.default_rng(seed)
    if stored is torch.float16:
        size = max(-6, min(2, size))
    weight = rng.standard_normal((n, k)) ** rng.choice([1, 3]) * 10.0**size
    weight[rng.integers(n)] = 0
    weight[:, rng.integers(k)] = 0
    table, zeros, (low, high) = None, None, (0, 15)
    if isinstance(levels, str):
        table = torch.from_numpy(np.sort(rng.uniform(-1, 1, 11 if levels == "table" else 1)).astype("f4"))
        high = len(table) - 1
    else:
        low, high = levels
    most = 1.0 if table is not None else max(high, -low)
    groups = -(-k // group)
    start = np.zeros((groups, n))
    for g in range(groups):
        start[g] = np.abs(weight[:, g * group : (g + 1) * group]).max(1) / most
    if low == 0 and table is None:
        start *= 2
        zeros = torch.from_numpy(rng.integers(0, high + 1, (groups, n)).astype("f4"))
    importance = torch.from_numpy((rng.uniform(0, 1, k) ** 8 * (rng.uniform(size=k) < 0.7)).astype("f4"))
    check(
        Problem(
            torch.from_numpy(weight.astype("f4")),
            group,
            torch.from_numpy(start.astype("f4")).to(stored).float(),
            torch.tensor(FACTORS[: 1 + seed % len(FACTORS)]),
            stored,
            zeros,
            importance if weighted else None,
            table,
            low,
            high,
        )
    )


@pytest.mark.isa
@pytest.mark.parametrize("format", FORMATS)
def test_a_searched_grid_is_no_worse_in_any_group(format, device, rng):
    """And its scales are those of plain rounding times one of the shares; nested ones are these, nested."""
    n, k = 12, 130
    weight = torch.from_numpy(rng.standard_normal((n, k)).astype("f4"))
    importance = torch.from_numpy(rng.uniform(0.1, 3, k).astype("f4"))
    plain, searched = (grids.fit(weight, format, search, importance) for search in (False, True))
    group = plain.groups(torch.arange(k))

    def cost_of(grid: grids.Grid) -> np.ndarray:
        _, values = grid.round(weight.t().contiguous(), group)
        cubes = ((weight.t() - values).abs() ** 3 * importance[:, None]).double()
        sums = torch.zeros(grid.step.shape, dtype=torch.float64).index_add_(0, group, cubes)
        return (sums.sum(1) if format.split("-")[1] == "tensor" else sums).numpy()

    before, after = cost_of(plain), cost_of(searched)
    nested = format.endswith("-dq")  # which moves a scale by some percent, for better or worse
    assert nested or (after <= before * (1 + 1e-5)).all()
    fine = format.startswith("int8")  # 8 bits may have nothing to win
    assert after.sum() < before.sum() or (fine and after.sum() == before.sum())
    ratios = (searched.step / plain.step).double().numpy()
    shares = np.array(grids.SHRINK)
    near = np.abs(ratios[..., None] - shares).min(-1)
    assert (near <= (0.1 if nested else 5e-3)).all()
    assert ratios.min() < 0.99 or fine
    # What the grid says and what is stored are the same.
    places = torch.from_numpy(rng.integers(0, len(searched.codes), (n, k), dtype=np.uint8))
    levels = torch.arange(searched.low, searched.high + 1.0) if searched.table is None else searched.table
    wanted = levels[places.long()] * searched.step[group].t() + searched.offset[group].t()
    torch.testing.assert_close(searched.assemble(places).decode(), wanted, rtol=1e-6, atol=1e-7)


def test_importance_moves_a_step():
    """A large weight in a column of no account is cut off."""
    weight = torch.tensor([[0.3, -0.21, 0.4, 0.17, -0.33, 0.09, 1.0, -0.25]])
    live = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1])
    even, weighed = (grids.fit(weight, "int4-channel", True, given) for given in (None, live))
    assert float(weighed.step) < 0.6 * float(even.step)


def test_any_number_of_threads_gives_the_same_bits(rng, threads):
    weight = torch.from_numpy(rng.standard_normal((150, 333)).astype("f4"))
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(of_format(weight, "int4-g32-asym").call())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_gpu_has_the_cpus_bits(device, rng):
    for format in (name for name in FORMATS if not name.endswith("-dq")):
        for n, k in ((1, 1), (31, 40), (65, 100)):
            weight = torch.from_numpy(rng.standard_normal((n, k)).astype("f4"))
            importance = torch.from_numpy(rng.uniform(0, 2, k).astype("f4"))
            for given_importance in (None, importance):
                problem = of_format(weight, format, given_importance)
                wanted = torch.ops.bitfold.search_steps(*vars(problem).values())
                for a, b in zip(problem.call(), wanted, strict=True):
                    assert torch.equal(a, b), (format, n, k)


def test_nothing_to_do(device):
    for n, k in ((0, 3), (4, 0)):
        groups = -(-k // 2)
        empty = Problem(torch.ones(n, k), 2, torch.ones(groups, n), torch.ones(1), torch.float16,
                        None, None, None, 0, 3)  # fmt: skip
        assert [tensor.shape for tensor in empty.call()] == [(groups, n)] * 2
    assert grids.fit(torch.zeros(3, 0), "int4-g16", True).assemble(torch.zeros(3, 0).byte()).shape == (3, 0)


def test_the_op_refuses(device):
    def call(**changes):
        given = {"weight": torch.zeros(4, 8), "group": 3, "start": torch.ones(3, 4), "factors": torch.ones(2)}
        given |= {
            "stored": torch.float16,
            "zeros": None,
            "importance": None,
            "table": None,
            "low": 0,
            "high": 3,
        }
        return lambda: Problem(**(given | changes)).call()

    call()()
    refusal(call(weight=torch.zeros(4, 8).double()), "weight is a float64", "float32")
    refusal(call(weight=torch.zeros(8)), "weight", "two dimensions")
    refusal(call(group=0), "group is 0", "at least 1")
    refusal(call(start=torch.ones(2, 4)), r"start .*\[2, 4\].* must be .*\[3, 4\]")
    refusal(call(zeros=torch.ones(3, 1)), r"zeros .*\[3, 4\]")
    refusal(call(importance=torch.ones(4)), r"importance .*\[8\]")
    refusal(call(factors=torch.ones(0)), "factors holds 0 numbers", "1 to 64")
    refusal(call(factors=torch.ones(65)), "factors holds 65 numbers", "1 to 64")
    refusal(call(factors=torch.ones(1, 2)), "factors", "one dimension")
    refusal(call(stored=torch.float64), "stored is float64", "float16, bfloat16 or float32")
    refusal(call(table=torch.zeros(17), high=16), "high is 16", "below 16")
    refusal(call(low=0, high=256), "256 levels")
    assert math.isfinite(float(call()()[1].sum()))
