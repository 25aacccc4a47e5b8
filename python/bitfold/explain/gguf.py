"""What the names of GGUF files mean, in words. Which tensor gets which type is said by the rules of gguf/mixes.py."""

from __future__ import annotations

from collections.abc import Iterator

from bitfold.gguf import mixes
from bitfold.gguf.mixes import ALWAYS, HEAD, Mix, Rule

STRUCTURES = {
    "Q4_0": "one fp16 scale, 4-bit codes",
    "Q4_1": "one fp16 scale and one fp16 minimum, 4-bit codes",
    "Q5_0": "one fp16 scale, 5-bit codes",
    "Q5_1": "one fp16 scale and one fp16 minimum, 5-bit codes",
    "Q8_0": "one fp16 scale, 8-bit codes",
    "Q2_K": "16 groups of 16, each a 4-bit scale and a 4-bit minimum; 2-bit codes",
    "Q3_K": "16 groups of 16, each a 6-bit scale; 3-bit codes",
    "Q4_K": "8 groups of 32, each a 6-bit scale and a 6-bit minimum; 4-bit codes",
    "Q5_K": "8 groups of 32, each a 6-bit scale and a 6-bit minimum; 5-bit codes",
    "Q6_K": "16 groups of 16, each an 8-bit scale; 6-bit codes",
    "IQ4_NL": "one fp16 scale, 4-bit codes into a table of 16 uneven levels",
    "IQ4_XS": "8 groups of 32, each a 6-bit scale; 4-bit codes into IQ4_NL's table",
    "MXFP4": "one power of two as the scale, 4-bit floats (e2m1)",
    "F32": "32-bit floats",
    "F16": "16-bit floats",
    "BF16": "bfloat16",
}
"""What the bytes of a block are, by type."""


def find(text: str) -> Mix | None:
    """The file type that a type's name ("q4_k_m") or a file's ("llama-7b.Q4_K_M.gguf") carries; None where it carries
    none."""
    return mixes.find(text) or mixes.find_in_file_name(text)


def exceptions(mix: Mix) -> list[str]:
    """Which tensors get another type than most, the first that fits; what the rules say of Falcon alone left out."""
    return [*_ruled(mix), *_lifted(mix)] if mix.is_quantized else []


def _ruled(mix: Mix) -> Iterator[str]:
    said: dict[tuple[str, str], list[str]] = {}
    for rule in mixes.RULES:
        kind = rule.type or mix.default
        if rule.when.usual and _reaches(rule, mix) and kind != mix.default:
            said.setdefault((rule.when.text, kind), []).extend(rule.roles or ("all others",))
        if rule.when is ALWAYS and not rule.roles and mix.name in rule.mixes:
            break  # no tensor is left for the rules behind it
    for (when, kind), roles in sorted(said.items(), key=lambda item: not item[0][0]):
        names = list(dict.fromkeys(roles))
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        yield f"{listed} {kind}{f' {when}' if when else ''}"


def _reaches(rule: Rule, mix: Mix) -> bool:
    return rule.reaches(rule.roles[0] if rule.roles else HEAD, mix.name)


def _lifted(mix: Mix) -> Iterator[str]:
    for lift in mixes.LIFTS:
        reached = {rule.type or mix.default for rule in mixes.RULES if rule.reaches(lift.role, mix.name)}
        if reached.union({mix.default}).intersection(lift.types):
            yield f"{lift.role} {lift.type} {lift.when.text} where it would be {' or '.join(lift.types)}"
