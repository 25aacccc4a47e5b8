"""The rules of mixes.py applied to a model: what every tensor becomes, in the order of the file, and why.

Names, shapes and a few numbers of the model are all that is needed, so the plan of a model that isn't there, a dry run
and quantizing share this.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bitfold.gguf import mixes
from bitfold.gguf.mixes import ALWAYS, DOWN, EMBEDDING, GATE, HEAD, UP, Case, Mix, V, block_values, row_bytes
from bitfold.gguf.words import quoted
from bitfold.shards import CheckpointError

_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a model. layers: all of them; heads, kv_heads: of the first layer; experts: 0 if dense."""

    architecture: str
    layers: int
    heads: int = 1
    kv_heads: int = 1
    experts: int = 0

    @property
    def sharing(self) -> int:
        """Heads that share keys and values; 0 for a model without keys and values."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70B."""
        if self.architecture == "llama":
            return self.layers == 80 and self.heads != self.kv_heads
        return (self.architecture, self.layers) in (("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68))


@dataclass(frozen=True)
class Item:
    """A tensor to decide on. shape: outermost dimension first; type: of the source, as GGUF calls it."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Overrides:
    """What the user wants otherwise than the file type has it.

    pure: the file type's own type everywhere; keep_output: output.weight stays as it is; embedding, output: a type for
    the token embedding and for the output head; patterns: regular expressions that are searched in names, and types:
    the first that is found decides.

    Raises ValueError for an unknown type or a broken expression.
    """

    pure: bool = False
    keep_output: bool = False
    embedding: str | None = None
    output: str | None = None
    patterns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("embedding", "output"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _type(getattr(self, name), f"the type of the {name}"))
        patterns = tuple(
            (pattern, _type(kind, f"the type of {pattern!r}")) for pattern, kind in self.patterns
        )
        object.__setattr__(self, "patterns", patterns)
        for pattern, _ in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def _type(text: str, what: str) -> str:
    if text.upper() not in mixes.TYPES:
        raise ValueError(f"{what} is {text!r}; it must be one of {', '.join(mixes.TYPES).lower()}")
    return text.upper()


@dataclass(frozen=True)
class Choice:
    """What a tensor becomes: its type before and after, and why.

    wanted: the type that the rules give it; another than `after` where its rows are no whole blocks of that type
    (`fallback` says so, else it is empty). quantized: whether the rules reached it at all.
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    wanted: str
    reason: str
    fallback: str
    quantized: bool

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def in_file_order(names: Iterable[str]) -> list[str]:
    """Names as llama-quantize orders them: what belongs to no layer, then the layers; by their bytes in each."""

    def key(name: str) -> tuple[int, bytes]:
        match = _BLOCK.match(name)
        return (int(match[1]) if match else -1, name.encode("utf-8", "surrogateescape"))

    return sorted(names, key=key)


def assign(
    mix: Mix,
    facts: Facts,
    items: Iterable[Item],
    overrides: Overrides = Overrides(),
    *,
    has_importance: bool = False,
) -> list[Choice]:
    """What every tensor becomes, in the order of the file that is written. has_importance: there is an importance file.

    Raises CheckpointError for a tensor of a mixture of experts that names no layer, where the rules ask for it.
    """
    named = {item.name: item for item in items}
    deciding = _Deciding(mix, facts, overrides, has_importance, named)
    return [deciding.choice(named[name]) for name in in_file_order(named)]


class _Deciding:
    """One pass over the tensors; the counts of some roles go on from tensor to tensor."""

    def __init__(
        self, mix: Mix, facts: Facts, overrides: Overrides, has_importance: bool, items: Mapping[str, Item]
    ) -> None:
        self.mix = mix
        self.facts = facts
        self.overrides = overrides
        self.has_importance = has_importance
        self.is_tied = "output.weight" not in items
        self.seen: Counter[str] = Counter()
        self.v_like = sum(mixes.role_of(name) == V for name in items)

    def choice(self, item: Item) -> Choice:
        kept = self.why_kept(item)
        if kept:
            return Choice(item.name, item.shape, item.type, item.type, item.type, kept, "", False)
        wanted, reason, may_fall_back = self.wanted(item)
        after, fallback = fallback_of(wanted, item.shape[-1]) if may_fall_back else (wanted, "")
        return Choice(item.name, item.shape, item.type, after, wanted, reason, fallback, True)

    def why_kept(self, item: Item) -> str:
        if len(item.shape) < 2:
            return "a vector: never quantized"
        if not item.name.endswith("weight"):
            return "not called a weight: never quantized"
        for pattern, what in mixes.NEVER:
            if fnmatchcase(item.name, pattern):
                return f"{what}: never quantized"
        if self.overrides.keep_output and item.name == "output.weight":
            return "left as it is by request"
        return ""

    def wanted(self, item: Item) -> tuple[str, str, bool]:
        """The type, why, and whether another may take its place where it doesn't fit."""
        role = mixes.role_of(item.name)
        given = self.given(item, role)
        if given:
            return (*given, False)
        if not self.mix.is_quantized:
            return self.mix.default, f"the type of {self.mix.name}", True
        for pattern, kind in self.overrides.patterns:
            if re.search(pattern, item.name):
                return kind, f"asked for by the pattern {pattern!r}", True
        if self.overrides.pure:
            return self.mix.default, f"the type of {self.mix.name}, pure", True
        if role == EMBEDDING and self.is_tied:
            if self.overrides.output:
                return self.overrides.output, "asked for, as the output head", True
            role = HEAD
        return (*self.by_rule(item, role), True)

    def given(self, item: Item, role: str) -> tuple[str, str] | None:
        """What was asked for embedding and head by name, for better or worse."""
        if role == EMBEDDING and self.overrides.embedding:
            by_pattern = any(re.search(pattern, item.name) for pattern, _ in self.overrides.patterns)
            if item.name == "token_embd.weight" or not by_pattern:
                return self.overrides.embedding, "asked for, as the token embedding"
        if role == HEAD and self.overrides.output:
            return self.overrides.output, "asked for, as the output head"
        return None

    def by_rule(self, item: Item, role: str) -> tuple[str, str]:
        case = self.case(item, role)
        label = HEAD if role == HEAD else role
        if role == HEAD and item.name != "output.weight":
            label = "the embedding as output head"
        kind, reason = self.mix.default, f"the type of {self.mix.name}"
        for rule in mixes.RULES:
            if rule.reaches(role, self.mix.name) and rule.when.holds(case):
                if rule.type is not mixes.DEFAULT:
                    kind, reason = rule.type, label
                    reason += f" {rule.when.text}" if rule.when is not ALWAYS else ""
                break
        for lift in mixes.LIFTS:
            if role == lift.role and kind in lift.types and lift.when.holds(case):
                kind, reason = lift.type, f"{label} {lift.when.text}"
        return kind, reason

    def case(self, item: Item, role: str) -> Case:
        place, of = self.seen[role], self.v_like if role == V else self.facts.layers
        self.seen[role] += 1
        if role in (DOWN, GATE, UP) and self.facts.experts > 1:
            place = self.layer_of(item.name)
        return Case(
            architecture=self.facts.architecture,
            role=role,
            shape=item.shape,
            block=block_values(self.mix.default),
            place=place,
            of=of,
            sharing=self.facts.sharing,
            experts=self.facts.experts,
            is_70b=self.facts.is_70b,
            has_importance=self.has_importance,
        )

    def layer_of(self, name: str) -> int:
        match = _BLOCK.match(name)
        if match is None or int(match[1]) >= self.facts.layers:
            raise CheckpointError(
                f"the tensor {quoted(name)} is in none of the {self.facts.layers} layers, as the rules for experts "
                "need it"
            )
        return int(match[1])


def fallback_of(wanted: str, columns: int) -> tuple[str, str]:
    """The type for rows of so many columns where `wanted` is wanted, and why it is another ("" if it isn't)."""
    if columns % block_values(wanted) == 0:
        return wanted, ""
    kind = mixes.FALLBACKS.get(wanted, wanted)
    if columns % block_values(kind):
        kind = mixes.LAST_RESORT
    return kind, f"{wanted} has blocks of {block_values(wanted)}, which rows of {columns} are no multiple of"


def tensor_bytes(choice: Choice) -> int:
    """Bytes of a tensor after."""
    return choice.parameters // choice.shape[-1] * row_bytes(choice.after, choice.shape[-1])


def fallback_notes(choices: Iterable[Choice]) -> list[str]:
    """A sentence for each kind of fallback: which tensors get another type than the rules give them, and why."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for choice in choices:
        if choice.fallback:
            groups.setdefault((choice.wanted, choice.after, choice.fallback), []).append(choice.name)
    return [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} wanted as {wanted} {'are' if len(names) > 1 else 'is'} "
        f"{after}: {why} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for (wanted, after, why), names in groups.items()
    ]
