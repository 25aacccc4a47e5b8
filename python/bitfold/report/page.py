"""The page of a report: its figures, its sentences, its tables, in one file of HTML that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from bitfold.evaluate import Estimate
from bitfold.outliers.columns import ACTIVATION_THRESHOLD, WEIGHT_THRESHOLD, Columns
from bitfold.outliers.measure import LAYER_SHARE, TOKEN_SHARE, Layer, Outliers
from bitfold.outliers.ways import WAYS
from bitfold.pages import asset
from bitfold.report import outlier_plots, plots
from bitfold.report.draw import Draw, inline, save
from bitfold.report.histogram import Histogram
from bitfold.report.measure import ModuleError, Report
from bitfold.sensitivity.result import Sensitivity
from bitfold.text import estimate, joined, natural, size

AnyColumns = TypeVar("AnyColumns", bound=Columns)
PANELS = 8  # matrices whose weights are drawn
ROWS = 40  # matrices in a plot of columns
_WHICH = 8  # columns named in a row of a table


@dataclass(frozen=True)
class Plot:
    """One plot of a report: its name as a file, how to draw it, and what it shows for those who don't see it."""

    name: str
    draw: Draw
    alt: str


def all_plots(report: Report) -> dict[str, Plot]:
    """The plots that the numbers of a report allow, by name."""
    found = [Plot("bytes", partial(plots.bytes_by_class, report.classes), _bytes_alt(report))]
    if any(m.relative_rmse is not None for m in report.modules):
        value = lambda m: None if m.relative_rmse is None else 100 * m.relative_rmse  # noqa: E731
        draw: Draw = partial(plots.error_map, report.modules, value, "relative error (%)")
        found.append(Plot("relative", draw, _errors_alt(report.modules)))
    if any(m.kl is not None for m in report.modules):
        value = lambda m: None if m.kl is None else 1e3 * m.kl.value  # noqa: E731
        unit = "KL alone (10⁻³ nats per token)"
        draw = partial(plots.error_map, report.modules, value, unit)
        found.append(Plot("kl", draw, _kl_alt(report.modules)))
    if report.sensitivity is not None:
        draw = partial(plots.sensitivity_map, report.sensitivity, _most_sensitive(report.sensitivity))
        alt = "KL of each weight alone in each format; the table has all numbers."
        found.append(Plot("sensitivity", draw, alt))
    if drawn := _drawn(report):
        draw = partial(plots.weights_on_grid, drawn)
        names = ", ".join(h.name for h in drawn)
        alt = f"Histograms of {names}, each with the values of its format as lines; a table tells how codes are used."
        found.append(Plot("grid", draw, alt))
    for name, columns, threshold, unit in (
        (
            "weight-columns",
            report.weight_columns,
            WEIGHT_THRESHOLD,
            "largest |w| of a column / RMS",
        ),
        ("activation-columns", report.activation_columns, ACTIVATION_THRESHOLD, "largest |x| of a column"),
    ):
        if columns:
            draw = partial(outlier_plots.outlier_columns, _shown(columns), threshold, unit)
            found.append(
                Plot(name, draw, f"Ranges of the {unit} for each matrix; the table has the numbers.")
            )
    if report.outliers is not None:
        found += _outlier_plots(report.outliers)
    if sum(one.comparison.mean_kl.value > plots.EXACT for one in report.tried) > 1:
        alt = "Size of the model against mean KL for each recipe; the table below has the numbers."
        found.append(Plot("size", partial(plots.size_against_kl, report.tried), alt))
    return {plot.name: plot for plot in found}


def _outlier_plots(found: Outliers) -> list[Plot]:
    drawn = []
    norms = _shown([one for one in found.inputs if one.stream])
    if any(one.outliers for one in norms):
        channels = ", ".join(str(one.index) for one in found.recurring if one.is_systematic)
        alt = f"Channels with outliers behind each norm; systematic: {channels or 'none'}. The table has numbers."
        drawn.append(Plot("features", partial(outlier_plots.features, norms, found.recurring), alt))
    layers = _losing(found)
    if layers:
        draw: Draw = partial(outlier_plots.losses, layers, tuple(WAYS))
        alt = "What the output of each layer loses in 8 bits, in four ways; the table has the numbers."
        drawn.append(Plot("losses", draw, alt))
    return drawn


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write every plot as PNG and SVG into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for plot in all_plots(report).values() for path in save(plot.draw, folder / plot.name)]


def render(report: Report) -> str:
    """The page as HTML."""
    figures = {name: inline(plot.draw, name, plot.alt) for name, plot in all_plots(report).items()}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "thousands": lambda n: "" if n is None else f"{n:,}",
        "percent": lambda x: "" if x is None else f"{x:.3%}",
        "nats": _nats,
        "plusminus": estimate,
        "joined": joined,
        "which": _which,
    }
    template = environment.from_string(asset("report", "report.html"))
    no_text = "give --base MODEL and --text FILE, with --attribution-tokens above 0"
    return template.render(
        r=report,
        title=f"{report.path.resolve().name}: what {report.recipe or 'quantizing'} did",
        css=Markup(asset("pages", "base.css") + asset("report", "report.css")),
        theme=Markup(asset("pages", "theme.html")),
        lead=_lead(report),
        facts=_facts(report),
        plots={name: figures.get(name) for name in ("bytes", "relative", "kl", "sensitivity", "grid", "size")},
        additivity=_additivity(report),
        sensitivity=_sensitivity(report.sensitivity),
        deepest={
            "relative": f"{max((m.relative_rmse or 0.0 for m in report.modules), default=0.0):.3%}",
            "kl": _nats(max((m.kl for m in report.modules if m.kl is not None), key=_value, default=None)),
        },
        modules=sorted(
            report.modules, key=lambda m: (-m.kl.value if m.kl is not None else 0.0, natural(m.name))
        ),
        grid_note=_grid_note(report),
        grid_missing=(
            "fp16 and bf16 have no scales, and grids too fine to draw"
            if not report.histograms
            else "give --base MODEL, whose weights are to be drawn"
        ),
        outliers=[
            _outlier_section(
                "Weights", "weight", report.weight_columns, "6 times the matrix’s root mean square",
                figures.get("weight-columns"), "give --base MODEL",
            ),
            _outlier_section(
                "Activations", "input of", report.activation_columns, "a magnitude of 6.0",
                figures.get("activation-columns"), no_text,
            ),
        ],
        eight_bits=_eight_bits(report.outliers, figures),
        tried=sorted(report.tried, key=lambda one: one.comparison.mean_kl.value),
        unplaced=_unplaced(report),
        origins=_origins(report),
    )  # fmt: skip


def _lead(report: Report) -> str:
    quantized = [t for t in report.tensors if t.quantized]
    weights = sum(math.prod(t.shape) for t in quantized)
    share = weights / max(1, sum(math.prod(t.shape) for t in report.tensors))
    formats = ", ".join(sorted({t.format for t in quantized}))
    text = f"{len(quantized)} weights, {share:.1%} of all numbers of the model, are stored as {formats}."
    if report.tried:
        kl = report.tried[0].comparison.mean_kl
        text += f" The probabilities of the next token are {_nats(kl)} thousandths of a nat from the base model’s."
    return text


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Name, value and remark of the numbers at the top."""
    quantized = [t for t in report.tensors if t.quantized]
    weights = max(1, sum(math.prod(t.shape) for t in quantized))
    before = ""
    if report.base_bytes is not None:
        before = f"from {size(report.base_bytes)}, {report.nbytes / report.base_bytes:.1%}"
    bits = 8 * sum(t.nbytes for t in quantized) / weights
    facts = [
        ("Size", size(report.nbytes), before),
        ("Bits per weight", f"{bits:.3f}", "of those quantized"),
    ]
    if report.tried:
        comparison = report.tried[0].comparison
        facts += [
            ("Mean KL", f"{_nats(comparison.mean_kl)}", "10⁻³ nats per token"),
            (
                "Perplexity",
                f"{comparison.model.perplexity.value:.3f}",
                f"base {comparison.base.perplexity.value:.3f}",
            ),
            ("Same top token", f"{comparison.top1.value:.1%}", "of tokens"),
        ]
    errors = [m.relative_rmse for m in report.modules if m.relative_rmse is not None]
    if errors:
        facts.append(("Largest weight error", f"{max(errors):.2%}", f"smallest {min(errors):.2%}"))
    return facts


def _additivity(report: Report) -> str:
    measured = [m for m in report.modules if m.kl is not None]
    if not measured:
        return ""
    total = math.fsum(m.kl.value for m in measured if m.kl is not None)
    ranked = sorted(measured, key=lambda m: -(m.kl.value if m.kl is not None else 0))
    first = ranked[0]
    assert first.kl is not None
    share = f", {first.kl.value / total:.0%} of the sum" if total > 0 else ""
    text = f"The largest is {first.name}{share}. Added up they come to {total * 1e3:.3g} thousandths of a nat"
    if report.tried:
        whole = report.tried[0].comparison.mean_kl.value
        text += f"; all quantized together, on the text of the last plot, they come to {whole * 1e3:.3g}"
    return text + "."


def _most_sensitive(found: Sensitivity) -> list[str]:
    """Those that fit a plot, in their own order: the weights whose KL is largest in whatever they lose most by."""
    worst = dict.fromkeys(found.modules, 0.0)
    for entry in found.entries:
        worst[entry.module] = max(worst[entry.module], found.kl(entry).value)
    kept = set(sorted(worst, key=lambda name: -worst[name])[:ROWS])
    return sorted(kept, key=natural)


def _sensitivity(found: Sensitivity | None) -> Mapping[str, Any] | None:
    """Tables of what each weight loses alone, and of how that adds up; KL in thousandths of a nat."""
    if found is None:
        return None
    rows = [
        (
            name,
            [
                None if entry is None else (_nats(found.kl(entry)), entry.output_error)
                for entry in (found.find(name, candidate) for candidate in found.candidates)
            ],
        )
        for name in sorted(found.modules, key=natural)
    ]
    together = {one.candidate: one for one in found.additivity}
    more = len(found.modules) - ROWS
    return {
        "protocol": str(found.protocol),
        "zero": f"{found.zero:g}",
        "candidates": found.candidates,
        "rows": rows,
        "note": f"The {ROWS} of {len(found.modules)} weights that lose most; the table has all."
        if more > 0
        else "",
        "together": [
            (one.candidate, f"{1e3 * one.added:.4g}", _nats(one.together), f"{one.ratio:.3f}")
            for one in (together.get(candidate) for candidate in found.candidates)
            if one is not None
        ],
    }


def _drawn(report: Report) -> list[Histogram]:
    """The matrices whose weights are drawn: those that matter most, as far as that was measured."""
    with_counts = [h for h in report.histograms if h.counts is not None]
    weight = {m.name: m.kl.value if m.kl is not None else (m.relative_rmse or 0.0) for m in report.modules}
    ranked = sorted(with_counts, key=lambda h: -weight[h.name])[:PANELS]
    return sorted(ranked, key=lambda h: natural(h.name))


def _grid_note(report: Report) -> str:
    with_counts = [h for h in report.histograms if h.counts is not None]
    if len(with_counts) <= PANELS:
        return ""
    by = "KL" if any(m.kl is not None for m in report.modules) else "relative error"
    return f"The {PANELS} of {len(with_counts)} matrices with the largest {by}."


def _shown(columns: Sequence[AnyColumns]) -> Sequence[AnyColumns]:
    """Those that fit a plot: the ones with the largest peaks, in their own order."""
    kept = sorted(columns, key=lambda c: -c.peak)[:ROWS]
    return [c for c in columns if c in kept]


def _outlier_section(
    title: str, what: str, columns: Sequence[Columns], rule: str, plot: Markup | None, missing: str
) -> Mapping[str, Any]:
    found = sum(len(c.outliers) for c in columns)
    total = sum(c.columns for c in columns)
    hit = sum(bool(c.outliers) for c in columns)
    matrices = f"{hit} of {len(columns)} {'matrices' if what == 'weight' else 'inputs'}"
    summary = f"{found:,} of {total:,} columns reach {rule}, in {matrices}."
    if any(len(c.outliers) > 0.5 * c.columns for c in columns):
        crowded = sum(len(c.outliers) > 0.5 * c.columns for c in columns)
        summary += f" In {crowded} of them most columns do: a threshold made for large models picks out little there."
    caption = "From the median of the columns (tick) to the largest (dot); dashed: the threshold."
    if len(columns) > ROWS:
        caption += f" The {ROWS} of {len(columns)} with the largest values; the table has all."
    return {
        "title": title, "what": what, "columns": columns, "rule": rule, "plot": plot, "missing": missing,
        "summary": summary, "caption": caption, "tokens": what != "weight",
    }  # fmt: skip


def _losing(found: Outliers) -> list[Layer]:
    """The layers that fit a plot: those that lose most in int8, in their own order."""
    kept = {layer.name for layer in sorted(found.layers, key=lambda one: -one.losses["int8"])[:ROWS]}
    return sorted((one for one in found.layers if one.name in kept), key=lambda one: natural(one.name))


def _eight_bits(found: Outliers | None, figures: Mapping[str, Markup]) -> Mapping[str, Any] | None:
    """Outlier features of the residual stream, and what 8 bits lose in each layer."""
    if found is None:
        return None
    more = len(found.layers) - ROWS
    return {
        "features": figures.get("features"),
        "losses": figures.get("losses"),
        "ways": WAYS,
        "layers": sorted(found.layers, key=lambda one: natural(one.name)),
        "note": f" The {ROWS} of {len(found.layers)} layers that lose most in int8; the table has all."
        if more > 0
        else "",
        "recurring": found.recurring,
        "rule": f"at least {LAYER_SHARE:.0%} of the norms and {TOKEN_SHARE:.0%} of the tokens",
    }


def _unplaced(report: Report) -> str:
    exact = [one.name for one in report.tried if one.comparison.mean_kl.value <= plots.EXACT]
    return f". Nearer than {plots.EXACT:g} nats, and so not drawn: {', '.join(exact)}" if exact else ""


def _origins(report: Report) -> str:
    stored = [f"{one.name} ({one.checkpoint})" for one in report.tried if one.checkpoint is not None]
    fresh = [one.name for one in report.tried if one.checkpoint is None]
    text = f"Checkpoints: {', '.join(stored)}."
    return f"{text} Quantized in memory for this page: {', '.join(fresh)}." if fresh else text


def _which(columns: Columns) -> str:
    named = ", ".join(f"{one.index} ({one.peak:.1f})" for one in columns.outliers[:_WHICH])
    more = len(columns.outliers) - _WHICH
    return f"{named}, and {more} more" if more > 0 else named


def _value(estimated: Estimate) -> float:
    return estimated.value


def _nats(value: Estimate | None) -> str:
    """In thousandths of a nat."""
    if value is None:
        return ""
    return estimate(Estimate(1e3 * value.value, None if value.error is None else 1e3 * value.error))


def _bytes_alt(report: Report) -> str:
    first = report.classes[0]
    return f"Bars of bytes by class of tensor; the largest is {first.name} with {size(first.nbytes)}."


def _errors_alt(modules: Sequence[ModuleError]) -> str:
    known = [m for m in modules if m.relative_rmse is not None]
    worst = max(known, key=lambda m: m.relative_rmse or 0.0)
    return f"Relative error by layer and role; the largest is {worst.name} with {worst.relative_rmse:.2%}."


def _kl_alt(modules: Sequence[ModuleError]) -> str:
    worst = max(
        (m for m in modules if m.kl is not None), key=lambda m: m.kl.value if m.kl is not None else 0.0
    )
    return f"KL of each weight quantized alone, by layer and role; the largest is {worst.name} with {_nats(worst.kl)}."
