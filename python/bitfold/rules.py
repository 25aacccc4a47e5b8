"""Which layer gets which format.

A recipe is a list of rules, a rule a pattern and a format. This file works on names and shapes alone, so that
quantizing a model in memory and streaming a checkpoint share it; recipes.py has the presets, and reads names and files.

How a module finds its rule:

- A pattern is a glob on the module's dotted name (`*` crosses dots, case counts). The first rule that matches wins.
- A rule reaches an embedding or the output head only if the last component of its pattern spells the module's own name
  without wildcards: `lm_head` and `*.embed_tokens` do, `*` and `model.*` don't. So both keep their source dtype by
  default. So does the router of a mixture of experts, which decides where a token goes: a small matrix whose errors
  can't be made up for.
- What no rule matches keeps its source dtype. Norms and all else that is neither linear nor embedding always do.
- A stack of experts, one 3-D parameter, is reached by its name (`*.experts.down_proj`) and by that of the module
  that holds it (`*.experts`). Each of its matrices is quantized by itself, all in one format.
- What computes in another way than bitfold's modules do (a subclass of nn.Linear, one of nn.Embedding that does
  more than scale its output as Gemma's does, experts of another kind) can't be quantized: unless a rule keeps it, that
  is an error, never a silent skip.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bitfold import activations
from bitfold.activations import FLOAT, Activations
from bitfold.bounds import OutlierBound
from bitfold.formats import parse
from bitfold.quantizers.awq import AwqOptions
from bitfold.quantizers.gptq import GptqOptions
from bitfold.quantizers.transforms import SmoothOptions

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
