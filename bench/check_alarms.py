"""How often `bitfold check` is wrong about zero points: false alarms on sound layers, and faults that it misses.

    python bench/check_alarms.py --layers 2400 --models 120 --out bench/results/check-alarms.json

Layers are drawn at random: a kind of weights (some whose mean is by itself a step away from 0), a shape, bits, groups,
symmetric or not, a quantizer (rounding as GPTQ's or AWQ's owners do, bitfold's GPTQ in three orders, columns scaled as
AWQ does), and the format that they are stored in. Each is looked at as it is, and with faults planted: the other
version's label, zero points moved by one, outputs in another order, and of version 1 of GPTQ zero points that were
packed each by itself, or overwritten by a 0 below them. Models are eight layers of a kind, judged together.
A fault that is "undecided" is not refused and not called sound. One thread: the matrices are small, and threads would
only wait for each other.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import bitfold
import torch
from bitfold.bench.machine import machine, versions
from bitfold.check import centre
from bitfold.check.problem import Report
from bitfold.check.zeros import Finding, Zeros, look
from bitfold.foreign import awq, words
from bitfold.foreign.awq import AwqScheme
from bitfold.foreign.gptq import GptqScheme
from bitfold.quantizers.gptq import GptqOptions, solve
from safetensors import safe_open
from torch import Tensor

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "model" / "model.safetensors"
BITS, GROUPS = (2, 3, 4, 4, 8), (16, 32, 64, 128, -1)
ROWS, COLUMNS = (32, 64, 96, 256, 512), (128, 256, 512, 1024)
QUANTIZERS = ("round", "round", "round awq", "scaled", "gptq static", "gptq none", "gptq groups")
NATURAL = tuple(range(8))


# ---- weights ----


def _shifted(share: float):
    return lambda shape, g: torch.randn(shape, generator=g) + share


def _laplace(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=g) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).clamp(min=1e-12).log()


def _student(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    normal = torch.randn((4, *shape), generator=g)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _exponential(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    return -torch.rand(shape, generator=g).clamp(min=1e-12).log()


def _uneven_columns(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=g) + 0.2) * torch.randn((1, shape[1]), generator=g).exp()


def _outliers(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    w = torch.randn(shape, generator=g)
    w[:, torch.randperm(shape[1], generator=g)[:2]] *= 12
    return w


def _dead(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    w = torch.randn(shape, generator=g)
    w[:, torch.randperm(shape[1], generator=g)[: shape[1] // 16]] = 0
    w[torch.randperm(shape[0], generator=g)[: shape[0] // 16]] = 0
    return w


def _low_rank(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    left, right = torch.randn((shape[0], 4), generator=g), torch.randn((4, shape[1]), generator=g)
    return left @ right * 0.4 + torch.randn(shape, generator=g)


def _demo(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    with safe_open(DEMO, framework="pt") as file:
        names = sorted(name for name in file.keys() if name.endswith(("_proj.weight", "embed_tokens.weight")))  # noqa: SIM118
        w = file.get_tensor(names[int(torch.randint(len(names), (), generator=g))]).to(torch.float32)
    k = max(size for size in (128, 256, 512) if size <= w.shape[1])
    return w[: w.shape[0] // 32 * 32, :k]


KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "laplace": _laplace,
    "student, 3": _student,
    "uniform": lambda shape, g: torch.rand(shape, generator=g) - 0.5,
    "uniform, off centre": lambda shape, g: torch.rand(shape, generator=g) - 0.4,
    "exponential - 1": lambda shape, g: _exponential(shape, g) - 1,
    "exponential": _exponential,
    "gamma, skewed": lambda shape, g: sum(_exponential(shape, g) for _ in range(4)) - 4,
    "mean 0.02": _shifted(0.02),
    "mean -0.1": _shifted(-0.1),
    "mean 0.35": _shifted(0.35),
    "mean -1": _shifted(-1.0),
    "row means": lambda shape, g: (
        torch.randn(shape, generator=g) + 0.4 * torch.randn((shape[0], 1), generator=g)
    ),
    "column means": lambda shape, g: (
        torch.randn(shape, generator=g) + 0.5 * torch.randn((1, shape[1]), generator=g)
    ),
    "uneven columns": _uneven_columns,
    "outlier columns": _outliers,
    "dead columns and rows": _dead,
    "low rank": _low_rank,
    "demo model": _demo,
}
OFF_CENTRE = {
    "uniform, off centre",
    "exponential",
    "mean -0.1",
    "mean 0.35",
    "mean -1",
    "uneven columns",
}
"""Kinds whose mean is by itself not 0: there a fault can be what makes it 0."""
ONE_STEP = ("normal", "laplace", "student, 3", "gamma, skewed", "uniform", "row means", "outlier columns")
"""Kinds that are also drawn with their mean moved to one step, the worst that a sound layer can be."""


# ---- quantizers ----


def rounded(
    w: Tensor, bits: int, group: int, symmetric: bool, clipped: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], zero points and fp16 scales [n, G] as the owners round; clipped: whether 0 is always in range."""
    n, k = w.shape
    parts = w.reshape(n, -1, k if group == -1 else group)
    top = (1 << bits) - 1
    low, high = parts.amin(-1), parts.amax(-1)
    if clipped:
        low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(high.abs(), low.abs())
        low = -high
    scales = ((high - low) / top).clamp(min=1e-5).to(torch.float16)
    wide = scales.to(torch.float32)
    zeros = torch.full_like(low, 1 << bits - 1) if symmetric else (-low / wide).round().clamp(0, top)
    codes = ((parts / wide[..., None]).round() + zeros[..., None]).clamp(0, top)
    return codes.reshape(n, k).to(torch.uint8), zeros.to(torch.uint8), scales


def _format(bits: int, group: int, symmetric: bool) -> str:
    return f"int{bits}-{'channel' if group == -1 else f'g{group}'}{'' if symmetric else '-asym'}"


def quantized(w: Tensor, case: dict[str, Any], g: torch.Generator) -> bitfold.QTensor:
    bits, group, symmetric = case["bits"], case["group"], case["symmetric"]
    if case["quantizer"].startswith("gptq"):
        x = (
            torch.randn((2 * w.shape[1], w.shape[1]), generator=g)
            * torch.randn((1, w.shape[1]), generator=g).exp()
        )
        options = GptqOptions(order=case["quantizer"].removeprefix("gptq "), measure=False)
        return solve(w, x.t() @ x, _format(bits, group, symmetric), options).qtensor
    if case["quantizer"] == "scaled":
        w = w * (0.5 * torch.randn((1, w.shape[1]), generator=g)).exp()
    codes, zeros, scales = rounded(w, bits, group, symmetric, case["quantizer"] != "round awq")
    return bitfold.pack(codes, scales, None if symmetric else zeros, format=_format(bits, group, symmetric))


def one_step(w: Tensor, case: dict[str, Any], sign: int) -> Tensor:
    """The weights with a mean, in all rows as many of their standard deviations, that is one step over all groups."""
    spread, low, high = w.std(1, keepdim=True), 0.0, 4.0
    for _ in range(20):
        share = (low + high) / 2
        codes, zeros, _ = rounded(w + sign * share * spread, case["bits"], case["group"], False)
        means = codes.reshape(len(w), zeros.shape[1], -1).to(torch.float32).mean(-1)
        low, high = (share, high) if sign * float((means - zeros).mean()) < 1 else (low, share)
    return w + sign * high * spread


# ---- layers ----


def draw(g: torch.Generator) -> dict[str, Any]:
    """A case of everything that a layer can be."""

    def one(of: Any) -> Any:
        return of[int(torch.randint(len(of), (), generator=g))]

    case: dict[str, Any] = {
        "kind": one(list(KINDS)),
        "bits": one(BITS),
        "group": one(GROUPS),
        "symmetric": one((True, False, False)),
        "quantizer": one(QUANTIZERS),
        "shape": (one(ROWS), one(COLUMNS)),
        "step": 0,
    }
    if case["kind"] in ONE_STEP and not case["symmetric"] and one((True, False)):
        case["step"] = one((1, -1))
    case["owner"] = one(("gptq", "gptq_v2", "awq")) if case["bits"] == 4 else one(("gptq", "gptq_v2"))
    if case["quantizer"] == "gptq groups" and case["owner"] == "awq":
        case["owner"] = "gptq"
    return case


def layer(case: dict[str, Any], g: torch.Generator) -> bitfold.QTensor:
    w = KINDS[case["kind"]](case["shape"], g)
    w = w * (0.4 * torch.randn((len(w), 1), generator=g)).exp()
    if case["step"]:
        w = one_step(w, case, case["step"])
    return quantized(w, case, g)


def stored(qtensor: bitfold.QTensor, case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The scheme of a sound file, and its tensors."""
    if case["owner"] == "awq":
        scheme: Any = AwqScheme(case["group"], not case["symmetric"])
    else:
        scheme = GptqScheme(
            case["bits"], case["group"], case["symmetric"], 2 if case["owner"] == "gptq_v2" else 1
        )
    return scheme, scheme.pack(qtensor)


def planted(qtensor: bitfold.QTensor, case: dict[str, Any]) -> list[tuple[str, Any, dict[str, Tensor]]]:
    """The same layer with each fault that its format can have: name, scheme as labelled, tensors."""
    scheme, tensors = stored(qtensor, case)
    found: list[tuple[str, Any, dict[str, Tensor]]] = []
    if case["owner"] != "awq":
        other = GptqScheme(scheme.bits, scheme.group, scheme.symmetric, 3 - scheme.version)
        found.append(("other version", other, tensors))
        return found + _zeros_of_0(qtensor, case, scheme)
    free = AwqScheme(case["group"], True)
    logical = free.unpack(tensors).unpack()
    assert logical.zeros is not None
    for move in (1, -1):
        zeros = (logical.zeros.to(torch.int16) + move).remainder(16).to(torch.uint8)
        moved = bitfold.pack(logical.codes, logical.scales, zeros, format=_format(4, case["group"], False))
        found.append(("zero points moved", scheme, free.pack(moved)))
    n = len(logical.codes)
    order = (torch.arange(0, n, 8)[:, None] + torch.tensor(awq.PLACE)).reshape(-1)
    shuffled = bitfold.pack(
        logical.codes[order], logical.scales, logical.zeros[order], format=_format(4, case["group"], False)
    )
    found.append(("natural order", scheme, free.pack(shuffled)))
    return found


def _zeros_of_0(qtensor: bitfold.QTensor, case: dict[str, Any], scheme: GptqScheme) -> list:
    """What writers made of zero points of 0 in version 1, where there are such and it makes a difference."""
    logical = qtensor.unpack()
    if scheme.version != 1 or case["bits"] == 3 or logical.zeros is None:
        return []
    bits, per = case["bits"], words.WORD // case["bits"]
    top = (1 << bits) - 1
    single = (logical.zeros.to(torch.int16) - 1) % (top + 1)  # each number by itself: [n, G]
    lines = (single == top).reshape(-1, per, single.shape[1])
    written = torch.where((lines.cumsum(1) > 0).reshape(single.shape), top, single)
    found = []
    for name, raw in (("packed one by one", single), ("overwritten", written)):
        tensors = GptqScheme(bits, case["group"], False, 2).pack(
            bitfold.pack(
                logical.codes, logical.scales, raw.to(torch.uint8), format=_format(bits, case["group"], False)
            )
        )
        if not torch.equal(tensors["qzeros"], scheme.pack(qtensor)["qzeros"]):
            found.append((name, scheme, tensors))
    return found


def verdict(case: dict[str, Any], scheme: Any, tensors: dict[str, Tensor]) -> tuple[str, Finding | None]:
    """What is said of one layer: "sound", "undecided", or the faults' names."""
    report, zeros = Report(Path()), Zeros()
    owner = "awq" if case["owner"] == "awq" else "gptq"
    finding = look(owner, "layer", scheme, tensors, report)
    if finding is not None:
        zeros.found["layer"] = finding
    return said([zeros], report), finding


def said(parts: list[Zeros], report: Report) -> str:
    faults = {problem.kind for problem in report.problems}
    for zeros in parts:
        zeros.settle()
        found = zeros.found.values()
        faults |= {"zeros-off-by-one" for finding in found if finding.shift}
        faults |= {"zeros-borrow"} if zeros.alone else set()
    if faults:
        return ", ".join(sorted(faults))
    return "undecided" if any(f.undecided for zeros in parts for f in zeros.found.values()) else "sound"


WANTED = {
    "other version": "zeros-off-by-one",
    "zero points moved": "zeros-off-by-one",
    "natural order": "nibble-order",
    "packed one by one": "zeros-borrow",
    "overwritten": "zeros-overwritten",
}


def _where(case: dict[str, Any]) -> str:
    if case["symmetric"]:
        return "symmetric"
    return "off centre" if case["step"] or case["kind"] in OFF_CENTRE else "centred"


def run_layers(count: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    sound, alarms, faults = {}, [], {}
    for number in range(count):
        case = draw(g)
        qtensor = layer(case, g)
        result, _ = verdict(case, *stored(qtensor, case))
        counts = sound.setdefault(f"{_where(case)}, {case['bits']} bits", Counter())
        counts[result if result in ("sound", "undecided") else "false alarm"] += 1
        if result not in ("sound", "undecided"):
            alarms.append({**case, "said": result, "number": number})
        for name, scheme, tensors in planted(qtensor, case):
            key = f"{name}, {_where(case)}, {case['bits']} bits"
            got, _ = verdict(case, scheme, tensors)
            hit = WANTED[name] in got or (case["symmetric"] and got not in ("sound", "undecided"))
            faults.setdefault(key, Counter())[
                "found" if hit else got if got in ("sound", "undecided") else "other"
            ] += 1
    return _result(sound, alarms, faults)


def run_models(count: int, seed: int) -> dict[str, Any]:
    """Models of eight layers that are alike in kind, bits and group, and differ in shape and quantizer."""
    g = torch.Generator().manual_seed(seed)
    sound, faults, alarms = {}, {}, []
    for _ in range(count):
        case = draw(g)
        case["symmetric"], case["owner"] = False, "gptq"
        layers = []
        for _ in range(8):
            more = draw(g)
            one = {**case, "shape": more["shape"], "quantizer": more["quantizer"], "group": case["group"]}
            layers.append((one, layer(one, g)))
        for version in (1, 2):
            report, zeros = Report(Path()), Zeros()
            for number, (one, qtensor) in enumerate(layers):
                scheme, tensors = stored(qtensor, one)
                labelled = GptqScheme(scheme.bits, scheme.group, False, version)
                finding = look("gptq", f"{number}", labelled, tensors, report)
                if finding is not None:
                    zeros.found[f"{number}"] = finding
            result = said([zeros], report)
            if version == 1:
                counts = sound.setdefault(f"{_where(case)}, {case['bits']} bits", Counter())
                counts[result if result in ("sound", "undecided") else "false alarm"] += 1
                if result not in ("sound", "undecided"):
                    alarms.append({**case, "said": result})
            else:
                counts = faults.setdefault(f"other version, {_where(case)}, {case['bits']} bits", Counter())
                counts["found" if "zeros-off-by-one" in result else result] += 1
    return _result(sound, alarms, faults)


def run_bent(count: int, seed: int) -> dict[str, Any]:
    """Sound layers of the worst kind: asymmetric ones of 2 to 4 bits, several groups a row, whose mean isn't 0 and
    mostly is a step. How near their intercepts come to those of wrong zero points: of layers whose mean is as near to a
    step as a fault's must be, the smaller intercept, in steps of the mean's sign, and its error.
    """
    g = torch.Generator().manual_seed(seed)
    alarms, intercepts, done = [], [], 0
    while done < count:
        case = draw(g)
        several = case["group"] != -1 and case["group"] < case["shape"][1]
        if _where(case) != "off centre" or case["bits"] == 8 or not several:
            continue
        done += 1
        result, finding = verdict(case, *stored(layer(case, g), case))
        if result not in ("sound", "undecided"):
            alarms.append({**case, "said": result})
        seen = None if finding is None else finding.centre
        if seen is None or seen.alone or abs(abs(seen.mean.value) - 1) > centre.NEAR:
            continue
        sign = 1 if seen.mean.value > 0 else -1
        least = min((seen.by_spread, seen.by_step), key=lambda found: sign * found.value)
        if least.value * sign > centre.CLEAR * least.error:
            intercepts.append({"value": sign * least.value, "error": least.error, **case})
    intercepts.sort(key=lambda found: -found["value"])
    return {"count": count, "false_alarms": alarms, "clear": len(intercepts), "largest": intercepts[:20]}


def _result(sound: dict[str, Counter], alarms: list[Any], faults: dict[str, Counter]) -> dict[str, Any]:
    return {
        "count": sum(sum(counts.values()) for counts in sound.values()),
        "sound": {name: dict(counts) for name, counts in sorted(sound.items())},
        "false_alarms": alarms,
        "planted": {name: dict(counts) for name, counts in sorted(faults.items())},
    }


def show(title: str, result: dict[str, Any]) -> None:
    print(f"{title}: {result['count']} sound ones, {len(result['false_alarms'])} false alarms")
    for part in ("sound", "planted"):
        print(f"  {part}")
        for name, counts in result[part].items():
            print(
                f"    {name:<44} {sum(counts.values()):5d}: {', '.join(f'{v} {k}' for k, v in counts.items())}"
            )
    for alarm in result["false_alarms"]:
        print(f"  FALSE ALARM {alarm}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2400)
    parser.add_argument("--models", type=int, default=120)
    parser.add_argument("--bent", type=int, default=0, help="sound layers of the worst kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "layers": run_layers(arguments.layers, arguments.seed),
        "models": run_models(arguments.models, arguments.seed + 1),
    }
    show("layers", result["layers"])
    show("models", result["models"])
    if arguments.bent:
        result["bent"] = bent = run_bent(arguments.bent, arguments.seed + 2)
        print(f"of the worst kind: {bent['count']} sound ones, {len(bent['false_alarms'])} false alarms")
        print(
            f"  {bent['clear']} with both intercepts {centre.CLEAR:.0f} errors from 0; the largest smaller ones:"
        )
        for found in bent["largest"]:
            print(f"    {found['value']:.2f} +- {found['error']:.2f} {found['kind']}, {found['bits']} bits")
        for alarm in bent["false_alarms"]:
            print(f"  FALSE ALARM {alarm}")
    if arguments.out:
        where = {"machine": machine(), "versions": versions(), "arguments": {"seed": arguments.seed}}
        arguments.out.write_text(json.dumps({**where, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
