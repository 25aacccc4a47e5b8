"""What a report says of zero points, once all modules have been looked at."""

from __future__ import annotations

import math
from pathlib import Path

from bitfold.check import zeros
from bitfold.check.problem import Report
from bitfold.foreign import gptq
from bitfold.shards import CONFIG_FILE

_FORMATS = {version: name for name, version in gptq.FORMATS.items()}
_ZEROS = {"gptq": "qzeros", "awq": "qzeros", "compressed-tensors": "weight_zero_point", "bitfold": "zeros"}


def tell(path: Path, owner: str, version: int | None, found: zeros.Zeros, report: Report) -> None:
    """Zero points that are wrong by one: the label's fault if it is that of all modules, else each module's.
    version: of GPTQ's format, as labelled.
    """
    off = {name: finding for name, finding in found.found.items() if finding.shift}
    moves = {finding.shift for finding in off.values()}
    telling = [finding for finding in found.found.values() if not finding.undecided]
    right = {1: -1, 2: 1}.get(version or 0)
    if off and len(off) == len(telling) and moves == {right}:
        other = 3 - int(version or 0)
        report.fault(
            "zeros-off-by-one",
            path / CONFIG_FILE,
            f"says version {version} of GPTQ's format, and the zero points of all {len(off)} modules that tell are "
            f"those of version {other}: read as they are labelled, {_how(list(off.values()))}",
            f"checkpoint_format must be '{_FORMATS[other]}'",
            zeros.RELABEL,
        )
        report.labels["checkpoint_format"] = _FORMATS[other]
    else:
        for name, finding in off.items():
            _one_off(f"{name}.{_ZEROS[owner]}", finding, report)
    open_ = [name for name, finding in found.found.items() if finding.undecided and not finding.shift]
    if open_:
        report.doubt(
            path,
            f"whether the zero points of {listed_modules(open_)} are right is undecided: their weights don't lie "
            "round 0, which may be so or may be the zero points' fault",
        )


def _one_off(where: str, finding: zeros.Finding, report: Report) -> None:
    size = "small" if finding.shift > 0 else "large"
    change = "larger by one" if finding.shift > 0 else "smaller by one"
    report.fault(
        "zeros-off-by-one",
        where,
        f"its zero points are too {size} by one: {_how([finding])}",
        f"each must be {change}",
        zeros.REWRITE_ZEROS.format(change=change),
    )


def _how(findings: list[zeros.Finding]) -> str:
    if all(finding.symmetric for finding in findings):
        return "all of them are next to the middle of the codes, where symmetric weights have theirs"
    means = [finding.centre.mean.value for finding in findings if finding.centre is not None]
    means = [mean for mean in means if math.isfinite(mean)]
    mean = sum(means) / max(1, len(means))
    return f"the weights of a group average {mean:+.2f} steps, whatever its step is"


def listed_modules(names: list[str]) -> str:
    """'1 module (a)', '3 modules (a, b, ...)'."""
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} module{'s' if len(names) > 1 else ''} ({shown})"
