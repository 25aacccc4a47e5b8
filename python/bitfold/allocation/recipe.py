"""An assignment as a recipe: rules with patterns where layers agree, with names where they don't; and as TOML."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping

from bitfold._C import __version__
from bitfold.outfile import Kind
from bitfold.rules import KEEP, ModuleInfo, Recipe, Rule, assign
from bitfold.sensitivity.candidates import Candidate

RECIPE = Kind("recipe that bitfold wrote", re.compile("# Written by bitfold\\b"))


def to_recipe(
    name: str, description: str, candidates: Mapping[str, Candidate], infos: Mapping[str, ModuleInfo]
) -> Recipe:
    """The recipe that gives each module its candidate, and keeps what has none; candidates: by module.

    Layers of one kind share a rule: that of the most of them; the others come before it by their names.
    """
    others = [name for name, info in infos.items() if name not in candidates and not info.is_default_kept]
    wanted = {**candidates, **dict.fromkeys(others, Candidate(None))}
    rules = _by_kind(wanted, infos)
    recipe = Recipe(name, description, tuple(rules))
    if not _gives(recipe, wanted, infos):  # a pattern that reaches more than its kind
        rules = [_rule(module, candidate) for module, candidate in wanted.items()]
        recipe = Recipe(name, description, tuple(rules))
        if not _gives(recipe, wanted, infos):
            raise ValueError(f"the assignment can't be written as rules: {name}")
    return recipe


def _by_kind(wanted: Mapping[str, Candidate], infos: Mapping[str, ModuleInfo]) -> list[Rule]:
    kinds: dict[str, list[str]] = {}
    for module in wanted:
        kinds.setdefault(_kind(module, infos[module]), []).append(module)
    named, shared = [], []
    for pattern, modules in kinds.items():
        counts = Counter(wanted[module] for module in modules)
        usual = counts.most_common(1)[0][0]
        named += [_rule(module, wanted[module]) for module in modules if wanted[module] != usual]
        shared.append(_rule(pattern if counts[usual] > 1 else _one(modules, wanted, usual), usual))
    return [*named, *shared]


def _one(modules: list[str], wanted: Mapping[str, Candidate], usual: Candidate) -> str:
    return next(module for module in modules if wanted[module] == usual)


def _kind(module: str, info: ModuleInfo) -> str:
    """The module's name with `*` in the place of numbers; an embedding or the head is alone in its kind."""
    if info.is_default_kept:
        return module
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _rule(pattern: str, candidate: Candidate) -> Rule:
    return Rule(pattern, candidate.format, candidate.method)


def _gives(recipe: Recipe, wanted: Mapping[str, Candidate], infos: Mapping[str, ModuleInfo]) -> bool:
    """Whether every module gets what it should, and no other anything."""
    for module, item in assign(recipe, infos).items():
        given = Candidate(None) if item.rule is None else Candidate(item.format, item.rule.method)
        expected = wanted.get(module, Candidate(None))
        if given.format != expected.format or (given.format and given.method != expected.method):
            return False
    return True


def to_toml(recipe: Recipe) -> str:
    """A file that `bitfold.recipes.read` reads as the same recipe."""
    lines = [
        f"# Written by bitfold {__version__}.",
        f"name = {_quoted(recipe.name)}",
        f"description = {_quoted(recipe.description)}",
    ]
    if recipe.kv_cache:
        lines.append(f"kv_cache = {_quoted(recipe.kv_cache)}")
    for rule in recipe.rules:
        lines += [
            "",
            "[[rules]]",
            f"match = {_quoted(rule.pattern)}",
            f"format = {_quoted(rule.format or KEEP)}",
        ]
        if rule.method != "rtn":
            lines.append(f"method = {_quoted(rule.method)}")
        if not rule.activations.is_float:
            lines.append(f"activations = {_quoted(str(rule.activations))}")
        if rule.keep_outlier_layers is not None:
            given = dataclasses.asdict(rule.keep_outlier_layers)
            said = ", ".join(f"{name} = {value!r}" for name, value in given.items() if value is not None)
            lines.append(f"keep_outlier_layers = {{ {said} }}")
        if rule.options is not None:
            for option in dataclasses.fields(rule.options):
                lines.append(f"{option.name} = {json.dumps(getattr(rule.options, option.name))}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
