"""The zero points of a checkpoint: read as its configuration says, and whether its tensors agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitfold.check import centre, sample
from bitfold.check.centre import Centre, Verdict
from bitfold.check.order import Borrows, Order, better_order, borrows, by_themselves, reordered
from bitfold.check.problem import Report
from bitfold.check.sample import Numbers
from bitfold.foreign import awq, words
from bitfold.foreign.scheme import Scheme
from bitfold.formats import parse

_LEAST_CONSTANT = 64  # zero points that are all alike, beside the middle of the codes
_BOTH_ENDS = (
    0.5  # the share of groups that use the first code and the last; nearly all do where zero points are free
)
_RARE = 1e-9  # the chance of sound zero points that look overwritten
_NEIGHBOURS = 2  # words on either side, of one group of columns

REWRITE_ZEROS = "the zero points are written anew, each {change}"
RELABEL = "the configuration is given the label that is right"
REORDER = "the tensors are packed anew in the order of the format"
REBORROW = "the zero points are packed anew without the borrows"


@dataclass(frozen=True)
class Finding:
    """What a module's zero points are.

    shift: what they must be moved by (0: nothing found); undecided: the direction in which they could be wrong;
    symmetric: all of them are the middle of the codes, or were to be; order: of outputs, if it is another than
    it must be; borrows: zero points that may have been packed each by itself, which `Zeros.alone` says for all
    modules.
    """

    centre: Centre | None = None
    bits: int = 4
    shift: int = 0
    undecided: int = 0
    symmetric: bool = False
    order: Order | None = None
    borrows: Borrows | None = None


@dataclass
class Zeros:
    """The findings of all modules of a checkpoint. alone: the evidence that zero points were packed each by
    itself.
    """

    found: dict[str, Finding] = field(default_factory=dict)
    alone: Borrows | None = None

    def settle(self) -> None:
        """Decide together what no module decides by itself: all that are undecided in one direction, of the
        same bits.
        """
        self.alone = by_themselves([part.borrows for part in self.found.values() if part.borrows is not None])
        for bits in {finding.bits for finding in self.found.values()}:
            for shift in centre.SHIFTS:
                open_ = {
                    name: finding
                    for name, finding in self.found.items()
                    if finding.bits == bits and finding.undecided == shift and finding.centre is not None
                }
                alike = [
                    finding
                    for finding in self.found.values()
                    if finding.bits == bits and not finding.symmetric
                ]
                fits = [finding for finding in alike if finding.shift == 0 and finding.undecided == 0]
                off = [finding for finding in alike if finding.shift == shift]
                if fits or not open_ or len(open_) + len(off) < centre.LEAST_TOGETHER:
                    continue
                parts = [finding.centre for finding in [*open_.values(), *off] if finding.centre is not None]
                seen = centre.pooled(parts)
                if bits == 2:
                    # Four codes for a whole row: a step is wider than most weights, and bends all layers alike.
                    seen = replace(seen, alone=any(part.alone for part in parts))
                if seen.judge(shift) is Verdict.OFF:
                    for name, finding in open_.items():
                        self.found[name] = replace(finding, shift=shift, undecided=0)


def look(
    owner: str, name: str, scheme: Scheme, tensors: Mapping[str, Tensor], report: Report
) -> Finding | None:
    """What the tensors of a foreign module say of its zero points; None where it has none. Faults that concern
    it alone go to `report`, zero points that are wrong by one don't: they may be the label's fault.
    """
    if owner == "compressed-tensors" and "weight_zero_point" not in tensors:
        return None
    numbers = sample.of_module(owner, scheme, tensors)
    if numbers is None:
        return None
    bits = parse(scheme.entry(tensors).format).bits
    half = 1 << bits - 1
    labelled = symmetric_label(scheme)
    constant = bool((numbers.zeros == numbers.zeros[0, 0]).all())
    value = int(numbers.zeros[0, 0])
    if owner == "awq":
        found = better_order(numbers, (awq.ORDER, awq.PLACE))
        if found is not None:
            return _out_of_order(name, numbers, bits, found, report)
    if constant and value == half:
        return Finding(bits=bits, symmetric=True)
    if labelled and constant and abs(value - half) == 1:
        return Finding(centre_of(numbers), bits, half - value, symmetric=True)
    single = _single(owner, scheme, tensors, numbers)
    if single is not None and _overwritten(name, single[0], numbers, bits, report):
        return Finding(bits=bits)
    alone = None if single is None else borrows(numbers, single[1])
    seen = centre_of(numbers)
    if constant and abs(value - half) == 1 and numbers.zeros.numel() >= _LEAST_CONSTANT and bits >= 4:
        shift = half - value
        if abs(shift * seen.mean.value - 1) <= centre.NEAR and _reach(numbers, bits) < _BOTH_ENDS:
            return Finding(seen, bits, shift, symmetric=True)
    if labelled and not constant:
        low, high = int(numbers.zeros.min()), int(numbers.zeros.max())
        report.fault(
            "symmetry",
            f"{name}.{'weight_zero_point' if owner == 'compressed-tensors' else 'qzeros'}",
            f"its zero points go from {low} to {high}, and the configuration says that the weights are symmetric",
            f"all must be {half}, or the configuration must say asymmetric",
            RELABEL,
        )
    return replace(judged(seen, bits), borrows=alone)


def judged(seen: Centre, bits: int) -> Finding:
    """What the evidence of one matrix says by itself."""
    verdicts = {shift: seen.judge(shift) for shift in centre.SHIFTS}
    for shift, verdict in verdicts.items():
        if verdict is Verdict.OFF:
            return Finding(seen, bits, shift)
    open_ = [shift for shift, verdict in verdicts.items() if verdict is Verdict.UNDECIDED]
    if open_:
        toward = 1 if seen.mean.value > 0 else -1
        return Finding(seen, bits, undecided=toward if toward in open_ else open_[0])
    return Finding(seen, bits)


def centre_of(numbers: Numbers) -> Centre:
    """The evidence of some rows."""
    return centre.measure(numbers.codes, numbers.zeros, numbers.scales, numbers.group)


def _reach(numbers: Numbers, bits: int) -> float:
    """The share of groups in which both the first and the last code are used."""
    n, whole = len(numbers.codes), numbers.codes.shape[1] // numbers.group
    parts = numbers.codes[:, : whole * numbers.group].reshape(n, whole, numbers.group)
    return float(((parts.amin(-1) == 0) & (parts.amax(-1) == (1 << bits) - 1)).float().mean())


def symmetric_label(scheme: Any) -> bool:
    """Whether the configuration says that all zero points are the middle of the codes."""
    return bool(scheme.symmetric) if hasattr(scheme, "symmetric") else not scheme.zero_point


def _out_of_order(name: str, numbers: Numbers, bits: int, found: Order, report: Report) -> Finding:
    parts = [part for part, other in (("qweight", found.codes), ("qzeros", found.zeros)) if other is not None]
    if found.sure:
        report.fault(
            "nibble-order",
            f"{name}.{' and '.join(parts)}",
            "each word has its eight outputs in another order than AWQ's: read in that order, codes, zero points and "
            "scales of an output don't belong together",
            f"it must be {', '.join(map(str, awq.ORDER))} from the lowest nibble",
            REORDER,
        )
    else:
        report.fault(
            "nibble-order",
            name,
            "words of qweight and words of qzeros have their eight outputs in different orders",
            f"both must have {', '.join(map(str, awq.ORDER))} from the lowest nibble",
        )
    seen = judged(centre_of(reordered(numbers, found)), bits)
    return Finding(seen.centre, bits, order=found if found.sure else None)


def _single(
    owner: str, scheme: Any, tensors: Mapping[str, Tensor], numbers: Numbers
) -> tuple[Tensor, Tensor] | None:
    """Of version 1 of GPTQ the numbers that lie in the words [n, G], and the zero points if each had been taken
    from its word by itself; None for others."""
    if owner != "gptq" or scheme.version != 1 or scheme.bits == 3:
        return None
    n = tensors["qweight"].shape[1]
    raw = words.unpack(tensors["qzeros"], scheme.bits, n)[:, numbers.rows].t().to(torch.int16)
    return raw, (raw + 1) % (1 << scheme.bits)


def _overwritten(name: str, raw: Tensor, numbers: Numbers, bits: int, report: Report) -> bool:
    """Old writers made all ones of 0 - 1 and wrote them over the rest of the word: every number above a 0 is all ones.

    A sound word looks so too, where nothing but zero points of 1 stands above the 0: the borrow runs through them. So
    the numbers above must be more than chance makes of the zero points round them, which no 0 has touched.
    """
    per = words.WORD // bits
    top = (1 << bits) - 1
    n, groups = raw.shape
    lines = raw[: n // per * per].reshape(-1, per, groups)  # the numbers of a word: [words, per, G]
    full = lines == top
    place = torch.arange(per)[None, :, None]
    lowest = torch.where(full.any(1), full.int().argmax(1), per)[:, None]  # [words, 1, G]
    above = place > lowest
    open_ = (lowest < per - 1).squeeze(1)
    if not bool(open_.any()) or bool((above & ~full).any()):
        return False
    whole = place < lowest
    chance = _all_ones((whole & (lines == 0)).sum(1), full.any(1).to(torch.int64), whole.sum(1))
    if float((above.sum(1) * chance.log())[open_].sum()) > math.log(_RARE):
        return False
    report.fault(
        "zeros-overwritten",
        f"{name}.qzeros",
        f"in {int(open_.sum())} of {open_.numel()} words a zero point of 0 has overwritten all above it with 0",
        "they must be those of their groups: quantize the model again",
    )
    return True


def _all_ones(ones: Tensor, zeros: Tensor, counts: Tensor) -> Tensor:
    """The chance, for each word [words, G], that a number above a 0 is all ones in version 1 where nothing was
    overwritten: as if zero points of 1 (through which a borrow runs) or of 0 (where each was packed by itself) were as
    frequent there as round it. ones: how many zero points of 1 stand under the first 0; zeros: whether there is a 0;
    counts: how many stand under it. All int64 [words, G]. The largest share in the same group, in the same rows and in
    the words next to it; 1 in a group that has nothing but 0.
    """
    found = []
    for hits in (ones, zeros):
        total = counts + zeros
        found += [
            ((hits.sum(0, keepdim=True) + 1) / (total.sum(0, keepdim=True) + 1)).expand(hits.shape),
            ((hits.sum(1, keepdim=True) + 1) / (total.sum(1, keepdim=True) + 2)).expand(hits.shape),
            (_near(hits) + 1) / (_near(total) + 2),
        ]
    return torch.stack(found).amax(0)


def _near(counts: Tensor) -> Tensor:
    """The sum over neighbouring words: [words, G]."""
    padded = torch.nn.functional.pad(counts, (0, 0, _NEIGHBOURS, _NEIGHBOURS))
    return padded.unfold(0, 2 * _NEIGHBOURS + 1, 1).sum(-1)
