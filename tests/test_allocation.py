"""Formats for a budget: the solver against brute force, bytes to the last one, recipes and files there and back."""

from __future__ import annotations

import itertools
import math

import pytest
from bitfold import recipes
from bitfold.allocation.recipe import to_recipe, to_toml
from bitfold.allocation.solver import Option, solve
from bitfold.quantizers.awq import AwqOptions
from bitfold.quantizers.gptq import GptqOptions
from bitfold.recipes import ModuleInfo, Recipe, Rule
from bitfold.sensitivity.candidates import Candidate, read
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy is not installed")

# ---- the solver ----


def brute_force(items, budget) -> float | None:
    """The smallest sum of costs over all choices, None where none fits."""
    sums = [
        math.fsum(option.cost for option in choice)
        for choice in itertools.product(*items)
        if sum(option.nbytes for option in choice) <= budget
    ]
    return min(sums, default=None)


SIZES = st.one_of(st.integers(0, 40), st.integers(1, 1000).map(lambda n: 32 * n), st.integers(10**9, 10**10))
COSTS = st.one_of(st.floats(0, 1), st.floats(1e-9, 1e-6), st.floats(-0.1, 0.1))
ITEMS = st.lists(st.lists(st.builds(Option, SIZES, COSTS), min_size=1, max_size=4), min_size=1, max_size=5)


@given(items=ITEMS, share=st.floats(0, 1.2))
@settings(max_examples=150, deadline=None)
def test_the_solver_finds_what_brute_force_finds(items, share):
    least = sum(min(option.nbytes for option in options) for options in items)
    most = sum(max(option.nbytes for option in options) for options in items)
    budget = least + int(share * (most - least))
    chosen = solve(items, budget)
    picked = [options[number] for options, number in zip(items, chosen, strict=True)]
    assert sum(option.nbytes for option in picked) <= budget
    span = max(abs(option.cost) for options in items for option in options)
    assert math.fsum(option.cost for option in picked) == pytest.approx(
        brute_force(items, budget), rel=1e-9, abs=1e-9 * span
    )


def test_the_whole_budget_counts_to_the_byte():
    items = [[Option(100, 1.0), Option(101, 0.0)], [Option(100, 1.0), Option(101, 0.5)]]
    assert solve(items, 200) == (0, 0)
    assert solve(items, 201) == (1, 0)
    assert solve(items, 202) == (1, 1)


def test_many_items_are_quick_and_fit(rng):
    items = [
        [Option(int(n) * bits, float(cost) * 4.0**-bits) for bits in range(2, 9)]
        for n, cost in zip(rng.integers(1e5, 1e8, 300), rng.gamma(1.0, 1.0, 300), strict=True)
    ]
    budget = int(4.25 * sum(options[0].nbytes // 2 for options in items))
    chosen = solve(items, budget)
    used = sum(options[number].nbytes for options, number in zip(items, chosen, strict=True))
    assert used <= budget
    # No single step up fits and helps: the least that the best answer must hold to.
    for options, number in zip(items, chosen, strict=True):
        better = [o for o in options if o.cost < options[number].cost]
        assert all(used - options[number].nbytes + o.nbytes > budget for o in better)


@pytest.mark.parametrize(
    ("items", "budget", "words"),
    [
        ([], 5, "empty"),
        ([[]], 5, "no option"),
        ([[Option(7, 0.0)], [Option(9, 0.0), Option(8, 1.0)]], 14, "14 bytes.*15"),
        ([[Option(1, math.nan)]], 5, "nan"),
        ([[Option(1, math.inf)]], 5, "inf"),
    ],
)
def test_bad_knapsacks(items, budget, words):
    with pytest.raises(ValueError, match=words):
        solve(items, budget)


# ---- recipes ----

LAYERS = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.up_proj")]
INFOS = {
    "model.embed_tokens": ModuleInfo("embedding", (64, 256)),
    **{name: ModuleInfo("linear", (32, 256)) for name in LAYERS},
    "model.layers.3.mlp.experts": ModuleInfo("experts", (4, 32, 32), obstacle="it is a stack"),
    "lm_head": ModuleInfo("linear", (64, 256), is_head=True, tied_to="model.embed_tokens"),
}
CANDIDATES = [read(text) for text in ("keep", "int4-g64", "gptq-int4-g64", "q4_k", "gptq-int3-g32")]


@given(
    picked=st.lists(st.sampled_from(CANDIDATES), min_size=24, max_size=24), head=st.sampled_from(CANDIDATES)
)
@settings(deadline=None)
def test_recipes_give_what_was_chosen_and_survive_their_file(picked, head, tmp_path_factory):
    wanted = dict(zip(LAYERS, picked, strict=True))
    head = Candidate(head.format)
    wanted |= {"model.embed_tokens": head, "lm_head": head}
    recipe = to_recipe("mine", "chosen", wanted, INFOS)
    path = tmp_path_factory.mktemp("recipes") / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert recipes.read(path) == recipe
    given = recipes.assign(recipe, INFOS)
    for name, candidate in wanted.items():
        assert given[name].format == candidate.format
        if candidate.format is not None:
            assert given[name].rule.method == candidate.method
    assert given["model.layers.3.mlp.experts"].format is None


def test_layers_that_agree_share_a_rule():
    wanted = {name: read("int4-g64" if "q_proj" in name else "int3-g32") for name in LAYERS}
    wanted[LAYERS[-1]] = read("int8")
    infos = {name: INFOS[name] for name in LAYERS}
    rules = to_recipe("mine", "", wanted, infos).rules
    assert [(rule.pattern, rule.format) for rule in rules] == [
        (LAYERS[-1], "int8-channel"),
        ("model.layers.*.self_attn.q_proj", "int4-g64"),
        ("model.layers.*.mlp.up_proj", "int3-g32"),
    ]


def test_options_and_odd_names_survive_the_file(tmp_path):
    rules = (
        Rule("*.q_proj", "int4-g64", "gptq", GptqOptions(damping=0.02, order="none", search=False)),
        Rule("*.k_proj", "int4-g64", "awq", AwqOptions(clip=False)),
        Rule("*", None),
    )
    recipe = Recipe('a "name"\\', "tabs\tand\nlines, ümlauts", rules)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert recipes.read(path) == recipe
