"""What a weight may become, and which weights are asked.

A candidate is a format and the way its codes are chosen, spelled as a recipe for all linear layers is: "int4-g64",
"gptq-int4-g64", or "keep" for the dtype that the weight has. A part is a weight with all modules that share it: they
get one candidate, or none of them could.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitfold import layout, recipes
from bitfold.calibration.blocks import find_blocks
from bitfold.formats import parse, stored_bytes
from bitfold.layout import Source
from bitfold.rules import KEEP, METHODS, Assignment, Rule

# A format for each step of about half a bit.
PLAIN = ("q2_k", "int3-g128", "q3_k", "nf4-b64-dq", "iq4_xs", "q4_k", "q5_k", "q6_k", "int8-channel")
CALIBRATED = tuple(name if name.startswith("int8") else f"gptq-{name}" for name in PLAIN)
# Of weights whose rows are no whole blocks of 256 columns.
RAGGED = {
    "q2_k": "int2-g32",
    "q3_k": "int3-g32",
    "iq4_xs": "int4-g64",
    "q4_k": "iq4_nl",
    "q5_k": "q5_0",
    "q6_k": "int8-channel",
}
ALONE = ("rtn", "gptq")
"""Methods that change one weight and nothing beside it. AWQ scales all layers of an input together."""


@dataclass(frozen=True)
class Candidate:
    """format: canonical, None: the weight is kept; method: of `bitfold.rules.METHODS`."""

    format: str | None
    method: str = "rtn"

    def __str__(self) -> str:
        if self.format is None:
            return KEEP
        return self.format if self.method == "rtn" else f"{self.method}-{self.format}"

    @property
    def needs_calibration(self) -> bool:
        return METHODS[self.method] is not None

    @property
    def rule(self) -> Rule:
        """The rule of a recipe that gives it to everything."""
        return Rule("*", self.format, self.method)


KEPT = Candidate(None)


def read(text: str) -> Candidate:
    """The candidate that is spelled so. Raises ValueError for a format or a method that there isn't."""
    if text == KEEP:
        return KEPT
    if text.endswith(".toml"):
        raise ValueError(
            f"candidate {text!r} is a file, it must be a format, such as int4-g64 or gptq-int4-g64"
        )
    (rule, *more) = recipes.get(text).rules
    if more or rule.pattern != "*":
        raise ValueError(f"candidate {text!r} is a recipe of several formats, it must be one format")
    if rule.method not in ALONE:
        raise ValueError(
            f"candidate {text!r} is by {rule.method}, which changes several layers together and has no effect of one "
            f"alone: it must be by one of {', '.join(ALONE)}"
        )
    return Candidate(rule.format, rule.method)


def read_all(texts: Sequence[str]) -> tuple[Candidate, ...]:
    """Candidates, each once, in the order in which they are named."""
    return tuple(dict.fromkeys(read(text) for text in texts if text))


@dataclass(frozen=True)
class Part:
    """A weight that takes part. names: of the modules that share it; shape: of the weight; kept: its bytes as stored;
    block: number of the decoder block that it lies in, None outside of them; is_head: whether it is the output head and
    nothing else."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    kept: int
    block: int | None
    is_head: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def nbytes(self, candidate: Candidate) -> int:
        """Bytes of all planes of the weight."""
        return self.kept if candidate.format is None else stored_bytes(candidate.format, *self.shape)

    def takes(self, candidate: Candidate) -> bool:
        """Whether its columns are whole blocks of the format, and calibrating can reach it if that is asked for."""
        if candidate.format is None:
            return True
        parsed = parse(candidate.format)
        fits = parsed.grid != "block" or self.shape[1] % parsed.group == 0
        return fits and (not candidate.needs_calibration or self.can_be_calibrated)

    @property
    def can_be_calibrated(self) -> bool:
        """Whether calibrating looks at what it multiplies: that of the decoder blocks alone."""
        return self.block is not None and len(self.names) == 1


def parts_of(source: Source, include: Sequence[str] = ()) -> tuple[Part, ...]:
    """The weights that take part: of all linear layers but the output head, and those of embeddings and the head that
    a pattern of `include` names, by the rule of recipes: its last component spells the module's own.

    Raises ValueError where a pattern names none, or nothing takes part.
    """
    kept = {name: Assignment(None, None, "") for name in source.infos}
    bytes_of = {step.module: step.nbytes for step in layout.steps(source, kept) if step.module}
    shared: dict[str, list[str]] = {}
    for name, info in source.infos.items():
        if info.obstacle is None and info.kind in ("linear", "embedding"):
            shared.setdefault(info.tied_to or name, []).append(name)
    named = {
        pattern: [n for n, i in source.infos.items() if Rule(pattern).matches(n, i)] for pattern in include
    }
    for pattern, found in named.items():
        if not found:
            default = [name for name, info in source.infos.items() if info.is_default_kept]
            raise ValueError(
                f"include is {pattern!r}, which names no module: embeddings and the output head must be spelled out, "
                f"as {' or '.join(default) or 'none of this model'}"
            )
    wanted = {name for found in named.values() for name in found}
    blocks = find_blocks(source)
    parts = []
    for owner, names in shared.items():
        infos = [source.infos[name] for name in names]
        if not all(info.is_default_kept for info in infos) or wanted & set(names):
            shape = (infos[0].shape[0], infos[0].shape[1])
            block = next((i for i, block in enumerate(blocks) if owner.startswith(f"{block}.")), None)
            parts.append(
                Part(tuple(names), shape, bytes_of[owner], block, all(info.is_head for info in infos))
            )
    if not parts:
        raise ValueError(f"{source.path} has no linear layer that can be quantized")
    return tuple(parts)


def for_part(part: Part, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those of the candidates that the part can become; a calibrated one means plain rounding to the same format where
    the part can't be calibrated (an embedding, the head), as it does in a recipe."""
    found = []
    for candidate in candidates:
        fitting = candidate if part.can_be_calibrated else Candidate(candidate.format)
        if part.takes(fitting):
            found.append(fitting)
    return tuple(dict.fromkeys(found))


def default(part: Part, calibrated: bool) -> tuple[Candidate, ...]:
    """What is measured where nothing else is asked for: in the place of a block format whose blocks the columns don't
    fill, one of smaller groups."""
    found = []
    for text in CALIBRATED if calibrated else PLAIN:
        candidate = read(text)
        assert candidate.format is not None
        if not part.takes(Candidate(candidate.format)):
            candidate = Candidate(parse(RAGGED[candidate.format]).canonical, candidate.method)
        found.append(candidate)
    return for_part(part, found)
