"""The recipe that somebody means: a preset, a format, weights and activations that go together, or a TOML file.

What a recipe is, and which layer gets what by it, is in rules.py, the table of presets in presets.py; both are imported
from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

from bitfold import _C, activations, bounds
from bitfold.activations import Activations
from bitfold.formats import FORMATS, parse
from bitfold.presets import LLM_INT8, PAIRS, RECIPES, linears
from bitfold.rules import KEEP, METHODS, Assignment, ModuleInfo, Recipe, Rule, assign

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["RECIPES", "Assignment", "ModuleInfo", "Recipe", "Rule", "assign", "get", "read"]


def get(recipe: str | Path | Recipe) -> Recipe:
    """The recipe that is meant: a preset's name, a format string (for all linear layers), weights and activations that
    go together ("w8a8-static", "llm-int8-t5"), either with a method in front of it ("gptq-int4-g64", "gptq-w8a8"), a
    TOML file, or a Recipe.

    Raises ValueError, with near matches, for a name that is none of them, and for a file that is no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    text = str(recipe)
    if text in RECIPES:
        return RECIPES[text]
    if isinstance(recipe, Path) or text.endswith(".toml"):
        return read(text)
    method, rest = _method_of(text)
    by = "" if method == "rtn" else f" by {method}"
    if is_pair(text):
        format, wanted = _pair(rest)
        return linears(text, f"{format}{by}, {wanted.says}", format, method=method, activations=wanted)
    try:
        format = parse(rest).canonical
    except ValueError as error:
        raise ValueError(f"recipe {text!r} is unknown: {_why_unknown(text, rest, error)}") from error
    name = format if method == "rtn" else f"{method}-{format}"
    return linears(name, f"{format}{by} for all linear layers", format, method=method)


def is_pair(text: str) -> bool:
    """Whether `text` names weights and activations that go together, and perhaps a method in front of them."""
    _, rest = _method_of(text)
    return rest in PAIRS or rest.startswith("llm-int8")


def _method_of(text: str) -> tuple[str, str]:
    """The method that stands in front of a format or a pair, and what is behind it."""
    method, _, rest = text.partition("-")
    return ("rtn", text) if METHODS.get(method) is None else (method, rest)


def _pair(text: str) -> tuple[str, Activations]:
    """Format and activations."""
    if text in PAIRS:
        return str(PAIRS[text].format), PAIRS[text].activations
    return LLM_INT8, activations.read(text)


def _why_unknown(text: str, format: str, error: ValueError) -> str:
    # What starts as a format is a format with a mistake in it, unless it is a preset's name but for a letter.
    is_format = format.partition("-")[0] in {family.partition("-")[0] for family in FORMATS}
    near = difflib.get_close_matches(text, RECIPES, n=3, cutoff=0.9 if is_format else 0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if is_format:
        return str(error)
    return f"it must be one of {', '.join(RECIPES)}, a format string, or a .toml file"


def read(path: str | Path) -> Recipe:
    """A recipe from a TOML file.

        name = "attention-int8"                 # optional: the file's name
        description = "attention in 8 bits"     # optional
        kv_cache = "int8"                       # optional: that a budget was for; said, never applied

        [[rules]]
        match = "*.self_attn.*"                 # default "*"
        format = "int8-g128"                    # or "keep"
        method = "gptq"                         # default "rtn"
        damping = 0.02                          # an option of the method (GptqOptions)
        activations = "float"                   # what the modules do with their inputs (activations.py)
        keep_outlier_layers = 0.05              # passes over layers that lose more; default: none (bounds.py)

    Raises ValueError where the file can't be read, is not TOML, or has unknown keys, formats or methods.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from error
    try:
        _check_keys(table, ("name", "description", "kv_cache", "rules"), "the recipe")
        kv_cache = _text(table, "kv_cache", "")
        if kv_cache and kv_cache not in _C.kv_formats():
            raise ValueError(f"kv_cache is {kv_cache!r}; it must be one of {', '.join(_C.kv_formats())}")
        rules = table.get("rules", [])
        if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
            raise ValueError("it has no rules; it must have at least one [[rules]]")
        return Recipe(
            name=_text(table, "name", path.stem),
            description=_text(table, "description", ""),
            rules=tuple(_read_rule(rule, number) for number, rule in enumerate(rules, 1)),
            kv_cache=kv_cache,
        )
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from error


def _read_rule(table: dict[str, Any], number: int) -> Rule:
    method = _text(table, "method", "rtn")
    wanted = METHODS.get(method)
    options = {field.name: field for field in dataclasses.fields(wanted)} if wanted else {}
    _check_keys(
        table, ("match", "format", "method", "activations", "keep_outlier_layers", *options), f"rule {number}"
    )
    if "format" not in table:
        raise ValueError(f'rule {number} has no format; it must name one, or "keep"')
    given = {key: _option(key, table[key], field.default) for key, field in options.items() if key in table}
    return Rule(
        _text(table, "match", "*"),
        _text(table, "format", KEEP),
        method,
        wanted(**given) if wanted and given else None,
        activations.read(_text(table, "activations", "float")),
        bounds.read(table["keep_outlier_layers"]) if "keep_outlier_layers" in table else None,
    )


def _option(key: str, value: Any, default: Any) -> Any:
    """An option of a method, of the type that its default has; a whole number will do for a real one."""
    if type(value) is not type(default) and not (type(default) is float and type(value) is int):
        raise ValueError(f"{key} is {value!r}; it must be a {type(default).__name__}, as {default!r} is")
    return value


def _check_keys(table: dict[str, Any], known: tuple[str, ...], owner: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(known)}"
            raise ValueError(f"{owner} has the unknown key {key!r}: {hint}")


def _text(table: dict[str, Any], key: str, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; it must be a string")
    return value
