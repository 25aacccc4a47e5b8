"""Which layer gets which format.

A recipe is a list of rules, a rule a pattern and a format. This file works on names and shapes alone, so that
quantizing a model in memory and streaming a checkpoint share it.

How a module finds its rule:

- A pattern is a glob on the module's dotted name (`*` crosses dots, case counts). The first rule that matches
  wins.
- A rule reaches an embedding or the output head only if the last component of its pattern spells the module's
  own name
  without wildcards: `lm_head` and `*.embed_tokens` do, `*` and `model.*` don't. So both keep their source
  dtype by default. So does the router of a mixture of experts, which decides where a token goes: a small matrix
  whose errors can't be made up for.
- What no rule matches keeps its source dtype. Norms and all else that is neither linear nor embedding always
  do.
- A stack of experts, one 3-D parameter, is reached by its name (`*.experts.down_proj`) and by that of the module
  that holds it (`*.experts`). Each of its matrices is quantized by itself, all in one format.
- What computes in another way than bitfold's modules do (a subclass of nn.Linear or nn.Embedding, experts of
  another kind) can't be quantized: unless a rule keeps it, that is an error, never a silent skip.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitfold import _C, activations, bounds
from bitfold.activations import FLOAT, KINDS, Activations
from bitfold.bounds import OutlierBound
from bitfold.formats import FORMATS, parse
from bitfold.quantizers.awq import AwqOptions
from bitfold.quantizers.gptq import GptqOptions
from bitfold.quantizers.transforms import SmoothOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEEP = "keep"
METHODS: dict[str, type | None] = {
    "rtn": None,
    "gptq": GptqOptions,
    "awq": AwqOptions,
    "smoothquant": SmoothOptions,
}
"""How codes are chosen, and the options that each way has: "rtn" rounds to nearest and looks at nothing but the weight,
the others look at what the layer multiplies, and need calibration data."""


@dataclass(frozen=True)
class Rule:
    """Modules whose name matches `pattern` get `format` (None or "keep": the source dtype).

    method: how the codes are chosen, of METHODS; options: the method's, None: as they are by default; activations: what
    the modules do with their inputs, an Activations or its string; keep_outlier_layers: layers above this bound are
    passed over: the next rule that matches them has them, or they keep their source dtype. Raises ValueError for an
    unknown format or method, for options of another method, and for activations that the format can't be multiplied
    with.
    """

    pattern: str = "*"
    format: str | None = None
    method: str = "rtn"
    options: Any = None
    activations: Activations = FLOAT
    keep_outlier_layers: OutlierBound | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError("the pattern of a rule is empty; it must be a glob on module names, such as '*'")
        if self.method not in METHODS:
            raise ValueError(
                f"method of rule {self.pattern!r} is {self.method!r}; it must be one of {', '.join(METHODS)}"
            )
        format = None if self.format in (None, KEEP) else parse(str(self.format)).canonical
        object.__setattr__(self, "format", format)
        self._set_activations(format)
        wanted = METHODS[self.method]
        if self.options is not None and type(self.options) is not wanted:
            raise ValueError(
                f"options of rule {self.pattern!r} are {type(self.options).__name__}; for {self.method} they must be "
                f"{wanted.__name__ if wanted else 'None'}"
            )

    def _set_activations(self, format: str | None) -> None:
        try:
            wanted = activations.read(self.activations)
            if format is not None:
                wanted.check(format)
        except ValueError as error:
            raise ValueError(f"rule {self.pattern!r}: {error}") from None
        if format is None and not wanted.is_float:
            raise ValueError(
                f"rule {self.pattern!r} has activations '{wanted}' and keeps its modules; it must name a format"
            )
        object.__setattr__(self, "activations", wanted)
        if format is None and self.keep_outlier_layers is not None:
            raise ValueError(f"rule {self.pattern!r} has keep_outlier_layers and keeps its modules anyway")

    @property
    def needs_calibration(self) -> bool:
        """Whether its modules can't be quantized by their weights alone."""
        return self.format is not None and bool(self.calibrates)

    @property
    def gains(self) -> bool:
        """Whether a text to calibrate on changes what its modules become: it must where it is needed, and may where
        activations have outliers."""
        return self.format is not None and (self.needs_calibration or self.activations.gains)

    @property
    def calibrates(self) -> str:
        """What of it looks at what modules multiply: its method or its activations; "" where nothing does."""
        if METHODS[self.method] is not None:
            return self.method
        return str(self.activations) if self.activations.needs_calibration else ""

    def matches(self, name: str, module: ModuleInfo) -> bool:
        """Whether the rule reaches the module (see the head of this file)."""
        if module.is_default_kept and self.pattern.rpartition(".")[2] != name.rpartition(".")[2]:
            return False
        if module.kind == "experts" and fnmatchcase(name.rpartition(".")[0], self.pattern):
            return True
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Rules in order of precedence, under a name. use: of a preset, what it is for, in a few words; kv_cache: the
    format of the KV cache that the rules were chosen along with, "" where none was: said, never applied."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    use: str = ""
    kv_cache: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether one of its rules does."""
        return any(rule.needs_calibration for rule in self.rules)

    @property
    def keeps_outlier_layers(self) -> bool:
        """Whether a text has to tell which layers its rules reach."""
        return any(rule.keep_outlier_layers is not None for rule in self.rules)

    @property
    def gains(self) -> bool:
        """Whether a text to calibrate on changes what one of its rules makes."""
        return any(rule.gains for rule in self.rules)


@dataclass(frozen=True)
class ModuleInfo:
    """What a recipe knows of a module.

    kind: "linear", "embedding" or "experts" (a 3-D parameter, under its own name); shape: of the weight; is_head: the
    output head; is_router: it says to which experts a token goes; tied_to: name of the first module that has the same
    weight, where that is another one; obstacle: why it can't be quantized ("it is a ..."), None if it can.
    """

    kind: str
    shape: tuple[int, ...]
    is_head: bool = False
    is_router: bool = False
    tied_to: str | None = None
    obstacle: str | None = None

    @property
    def is_default_kept(self) -> bool:
        """Whether only a rule that spells its name reaches it."""
        return self.is_head or self.is_router or self.kind == "embedding"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight, or of each expert's."""
        return self.shape[-2], self.shape[-1]

    def weight_of(self, name: str) -> str:
        """What the weight is called in the state dict of a model that has the module under this name."""
        return name if self.kind == "experts" else f"{name}.weight"


@dataclass(frozen=True)
class Assignment:
    """What a module gets: a canonical format (None: its source dtype), by which rule (None: by no rule), and
    why."""

    format: str | None
    rule: Rule | None
    reason: str

    @property
    def activations(self) -> Activations:
        """What the module does with its input."""
        return FLOAT if self.rule is None else self.rule.activations


def _linears(
    name: str,
    description: str,
    format: str,
    use: str = "",
    method: str = "rtn",
    activations: str | Activations = FLOAT,
) -> Recipe:
    rule = Rule("*", format, method, activations=activations)  # type: ignore[arg-type]
    return Recipe(name, description, (rule,), use)


ATTENTION = "*[._]att*n*.*"
"""Names of attention blocks: self_attn, self_attention, attention, attn."""

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _linears(
            "fp16",
            "16-bit floats (IEEE half)",
            "fp16",
            "halves a model that is stored in 32 bits; what the others are compared with",
        ),
        _linears(
            "bf16",
            "16-bit floats (bfloat16)",
            "bf16",
            "as fp16, for weights beyond fp16's range; fewer digits",
        ),
        _linears(
            "int8",
            "8-bit integers, one scale a row",
            "int8-channel",
            "when next to nothing may be lost: half the size",
        ),
        _linears(
            "int8-g128",
            "8-bit integers, one scale for 128 weights",
            "int8-g128",
            "int8 where a row has a few weights far larger than the rest",
        ),
        _linears(
            "int4-g128",
            "4-bit integers, one scale for 128 weights",
            "int4-g128",
            "the usual start: about a quarter of the size, a small loss",
        ),
        _linears(
            "int4-g32",
            "4-bit integers, one scale for 32 weights",
            "int4-g32",
            "int4 with more scales: a smaller loss, a little larger",
        ),
        _linears(
            "int4-g128-asym",
            "4-bit integers, scale and zero point for 128 weights",
            "int4-g128-asym",
            "int4 where weights lie to one side of zero",
        ),
        _linears(
            "int3-g64",
            "3-bit integers, one scale for 64 weights",
            "int3-g64",
            "when 4 bits don't fit; the loss shows",
        ),
        _linears(
            "int2-g64",
            "2-bit integers, one scale for 64 weights",
            "int2-g64",
            "to see what breaks: by rounding alone, too much does",
        ),
        _linears(
            "nf4",
            "4-bit normal floats, blocks of 64",
            "nf4-b64",
            "levels placed for bell-shaped weights; what QLoRA trains on",
        ),
        _linears(
            "nf4-dq",
            "4-bit normal floats, blocks of 64, 8-bit scales",
            "nf4-b64-dq",
            "nf4 with its scales in 8 bits: smaller, hardly worse",
        ),
        _linears(
            "fp4",
            "4-bit floats, blocks of 64",
            "fp4-b64",
            "to compare with bitsandbytes' fp4; nf4 has the better placed levels",
        ),
        _linears(
            "fp8",
            "8-bit floats (e4m3), one scale a row",
            "fp8-e4m3-channel",
            "8 bits for weights of very different sizes within a row",
        ),
        _linears(
            "fp8-block",
            "8-bit floats (e4m3), one scale for 128 rows and 128 columns",
            "fp8-e4m3-b128x128",
            "8-bit floats as DeepSeek-V3 has them: the scales take next to no room",
        ),
        _linears(
            "fp8-w8a8",
            "8-bit floats (e4m3), one scale a row; inputs too, row by row",
            "fp8-e4m3-channel",
            "for GPUs that multiply 8-bit floats; elsewhere fp8 has the same size and a smaller loss",
            activations="fp8",
        ),
        Recipe(
            "int4-mixed",
            "attention in 8-bit integers, the rest in 4-bit",
            (Rule(ATTENTION, "int8-channel"), Rule("*", "int4-g128")),
            "between int4 and int8: attention in 8 bits, the larger MLPs in 4",
        ),
        _linears(
            "gptq-int4-g128",
            "int4-g128, each column making up for the errors before it",
            "int4-g128",
            "with a text for calibration: a smaller loss than int4-g128 at the same size",
            method="gptq",
        ),
        _linears(
            "gptq-int3-g64",
            "int3-g64, each column making up for the errors before it",
            "int3-g64",
            "with a text for calibration, when 4 bits don't fit",
            method="gptq",
        ),
        _linears(
            "awq-int4-g128",
            "int4-g128, columns with large inputs scaled up, ranges clipped",
            "int4-g128",
            "with a text for calibration: a smaller loss than int4-g128 at the same size",
            method="awq",
        ),
        _linears(
            "awq-int3-g128",
            "int3-g128, columns with large inputs scaled up, ranges clipped",
            "int3-g128",
            "with a text for calibration, when 4 bits don't fit",
            method="awq",
        ),
    )
}
"""The presets: linear layers only; embeddings, output head and norms keep their source dtype."""

PAIRS: dict[str, tuple[str, str]] = {
    "w8a8": ("int8-channel", "int8"),
    "w8a8-static": ("int8-channel", "int8-static"),
    "fp8-w8a8": ("fp8-e4m3-channel", "fp8"),
    "fp8-w8a8-static": ("fp8-e4m3-channel", "fp8-static"),
}
"""Weights and activations that go together, as recipes name them, a method in front or none: format, activations."""


def get(recipe: str | Path | Recipe) -> Recipe:
    """The recipe that is meant: a preset's name, a format string (for all linear layers), weights and activations that
    go together ("w8a8-static", "llm-int8-t5"), either with a method in front of it ("gptq-int4-g64",
    "smoothquant-w8a8"), a TOML file, or a Recipe.

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
        return _linears(text, f"{format}{by}, {wanted.says}", format, method=method, activations=wanted)
    try:
        format = parse(rest).canonical
    except ValueError as error:
        raise ValueError(f"recipe {text!r} is unknown: {_why_unknown(text, rest, error)}") from error
    name = format if method == "rtn" else f"{method}-{format}"
    return _linears(name, f"{format}{by} for all linear layers", format, method=method)


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
    format, wanted = PAIRS.get(text, (KINDS["llm-int8"].format, text))
    return format, activations.read(wanted)


def _why_unknown(text: str, format: str, error: ValueError) -> str:
    # What starts as a format is a format with a mistake in it, unless it is a preset's name but for a letter.
    is_format = format.partition("-")[0] in {family.partition("-")[0] for family in FORMATS}
    near = difflib.get_close_matches(
        text, [*RECIPES, "llm-int8", *PAIRS], n=3, cutoff=0.9 if is_format else 0.6
    )
    if near:
        return f"did you mean {' or '.join(near)}?"
    if is_format:
        return str(error)
    return f"it must be one of {', '.join([*RECIPES, 'llm-int8', *PAIRS])}, a format string, or a .toml file"


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


def assign(recipe: Recipe, modules: Mapping[str, ModuleInfo]) -> dict[str, Assignment]:
    """What every module gets, by name, in the order of `modules`.

    Raises ValueError where a rule matches nothing or never wins, where tied modules get two formats, where a rule gives
    a format to what can't have one (or no rule keeps it), and where it takes a text to say what rules reach.
    """
    if recipe.keeps_outlier_layers:
        raise ValueError(
            f"recipe {recipe.name!r} keeps layers by what they lose on a text: give --calibration FILE to 'bitfold "
            "quantize', or plain rules, which 'bitfold outliers --recipe' makes of it (bitfold.outliers.keep.resolve)"
        )
    assignments = {}
    for name, module in modules.items():
        assignments[name] = _assign_one(recipe, name, module)
    _check_rules_used(recipe, modules, assignments)
    for name, module in modules.items():
        if module.tied_to is not None:
            _check_tied(name, assignments[name], module.tied_to, assignments[module.tied_to])
    return assignments


def _assign_one(recipe: Recipe, name: str, module: ModuleInfo) -> Assignment:
    rule = next((rule for rule in recipe.rules if rule.matches(name, module)), None)
    format = rule.format if rule else None
    if module.obstacle and (format is not None or (rule is None and not module.is_default_kept)):
        raise ValueError(
            f"module {name} (of shape {list(module.shape)}) can't be quantized, {module.obstacle}: put a rule that "
            f"keeps it first (match = {name!r}, format = 'keep')"
        )
    if rule is not None:
        if format is not None:
            _check_columns(name, module, rule, format)
            _check_order(name, module, rule)
            _check_multiplies(name, module, rule)
        return Assignment(format, rule, f"rule {rule.pattern!r}")
    if module.is_default_kept:
        kind = (
            "output head" if module.is_head else "router of the experts" if module.is_router else "embedding"
        )
        return Assignment(None, None, f"the {kind} is kept by default")
    return Assignment(None, None, "no rule matches")


def _check_columns(name: str, module: ModuleInfo, rule: Rule, format: str) -> None:
    try:
        parse(format).check_columns(module.shape[-1])
    except ValueError as error:
        raise ValueError(f"module {name} can't be quantized by rule {rule.pattern!r}: {error}") from None


def _check_order(name: str, module: ModuleInfo, rule: Rule) -> None:
    """GPTQ's groups along its own order need a g_idx, which a stack has no place for."""
    if module.kind == "experts" and getattr(rule.options, "order", None) == "groups":
        raise ValueError(
            f"{name} is a stack of experts, and rule {rule.pattern!r} has the order 'groups', which needs a g_idx for "
            "each matrix; for experts it must be 'static' or 'none'"
        )


def _check_multiplies(name: str, module: ModuleInfo, rule: Rule) -> None:
    """Activations are for what multiplies: an embedding doesn't, and a stack has no place for what is calibrated."""
    if rule.activations.is_float:
        return
    if module.kind == "embedding":
        raise ValueError(
            f"{name} is an embedding, which multiplies nothing, and rule {rule.pattern!r} has activations "
            f"'{rule.activations}': give it a rule of its own"
        )
    if module.kind == "experts" and rule.activations.needs_calibration:
        raise ValueError(
            f"{name} is a stack of experts, and rule {rule.pattern!r} has activations '{rule.activations}', which keep "
            "something for each layer; for experts they must be 'float', 'int8', 'llm-int8' or 'fp8'"
        )


def _check_rules_used(
    recipe: Recipe, modules: Mapping[str, ModuleInfo], assignments: Mapping[str, Assignment]
) -> None:
    for rule in recipe.rules:
        matched = [name for name, module in modules.items() if rule.matches(name, module)]
        if not matched:
            raise ValueError(
                f"rule {rule.pattern!r} of recipe {recipe.name!r} matches no module: {_hint(rule, modules)}"
            )
        winners = {assignments[name].rule for name in matched}
        if rule not in winners and rule.pattern != "*":
            taken = next(iter(winners))
            assert taken is not None
            raise ValueError(
                f"rule {rule.pattern!r} of recipe {recipe.name!r} never wins: put it before rule "
                f"{taken.pattern!r}, which takes all it matches"
            )


def _hint(rule: Rule, modules: Mapping[str, ModuleInfo]) -> str:
    """Why a rule may match nothing: a kind that it must name, or a typo."""
    kept = [
        name for name, module in modules.items() if module.is_default_kept and fnmatchcase(name, rule.pattern)
    ]
    if kept:
        return f"embeddings, routers and the output head must be named, as in {kept[0]!r}"
    parts = {part for name in modules for part in name.split(".")}
    for part in rule.pattern.split("."):
        near = difflib.get_close_matches(part.strip("*"), parts, n=1)
        if near and part not in parts:
            return f"did you mean {near[0]!r}?"
    return (
        f"there are {len(modules)}, such as {list(modules)[-1]!r}"
        if modules
        else "the model has no linear layer."
    )


def _check_tied(name: str, one: Assignment, other_name: str, other: Assignment) -> None:
    if one.format != other.format:
        raise ValueError(
            f"{other_name} and {name} share one weight, but the recipe gives them two formats "
            f"({other.format or KEEP} and {one.format or KEEP}): name both with one format"
        )
