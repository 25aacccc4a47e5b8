"""`bitfold quantize --target-bpw`, `--target-size`: formats are chosen for a budget, then all goes its usual way."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from bitfold.allocation.allocate import Outcome, Target, allocate
from bitfold.allocation.recipe import RECIPE, to_toml
from bitfold.allocation.rounds import Round
from bitfold.cli.console import out, paragraph, parse_device, parse_dtype, progress, table
from bitfold.cli.eval import read_text
from bitfold.cli.plan import parse_size
from bitfold.cli.sensitivity import thousandths, warn_of_overlap
from bitfold.outfile import check_output, write_text
from bitfold.sensitivity.ground import TOKENS, Texts


@dataclass(frozen=True)
class Options:
    """The options of `bitfold quantize` that choose formats for a budget."""

    target_bpw: float = 0.0
    target_size: str = ""
    text: Path | None = None
    sensitivity: Path | None = None
    formats: str = ""
    include: tuple[str, ...] = ()
    tokens: int = TOKENS
    window: int = 0
    context: int | None = None
    batch: int = 1
    rounds: int = 1
    save_recipe: Path | None = None

    @property
    def asked(self) -> bool:
        return bool(self.target_bpw or self.target_size)

    def given(self) -> list[str]:
        """The options that are not as they are by default, as they are spelled."""
        return [f"--{f.name.replace('_', '-')}" for f in fields(self) if getattr(self, f.name) != f.default]

    def check(self) -> None:
        """Raises ValueError where options contradict each other or say nothing."""
        if self.target_bpw and self.target_size:
            raise ValueError("--target-bpw and --target-size are both given; it must be one of them")
        if not self.asked and self.given():
            raise ValueError(
                f"{self.given()[0]} is given, which is for --target-bpw or --target-size: name a budget"
            )
        if self.asked and self.text is None and self.sensitivity is None:
            raise ValueError(
                f"{self.given()[0]} is given without anything to choose by: add --text FILE, or --sensitivity FILE of "
                "'bitfold sensitivity'"
            )
        if self.context is None and self.batch != 1:
            raise ValueError(
                f"--batch is {self.batch}, which is for --context: say how many tokens a sequence has"
            )
        if self.context is not None and self.target_bpw:
            raise ValueError(
                "--context is given with --target-bpw, and a KV cache has no part in bits per weight: give "
                "--target-size"
            )
        if self.save_recipe is not None:
            check_output("--save-recipe", self.save_recipe, RECIPE)


def choose(
    model: Path,
    options: Options,
    *,
    calibration: str,
    samples: int,
    sequence_length: int,
    seed: int,
    dtype: str,
    device: str,
    json: bool,
) -> Outcome:
    """Choose, print what was predicted and what was measured, and write the recipe where it is to be."""
    text = "" if options.text is None else read_text(options.text)
    if options.text is not None and not text.strip():
        raise ValueError(f"the text {options.text} is empty")
    shown: list[Round] = []
    with progress("choosing formats") as update:
        found = allocate(
            model,
            Target(
                options.target_bpw or None,
                parse_size(options.target_size, "--target-size") if options.target_size else None,
                options.context,
                options.batch,
            ),
            Texts(text, options.tokens, options.window, calibration, samples, sequence_length or None, seed),
            sensitivity=options.sensitivity,
            candidates=options.formats.split(","),
            include=options.include,
            rounds=options.rounds,
            name=options.save_recipe.stem if options.save_recipe is not None else "",
            dtype=parse_dtype(dtype) or parse_dtype("float32"),  # type: ignore[arg-type]
            device=parse_device(device),
            told=shown.append,
            progress=update,
        )
    warn_of_overlap(found.found)
    if options.save_recipe is not None:
        write_text(options.save_recipe, to_toml(found.recipe))
    if not json:
        show(found, options.save_recipe)
    return found


def show(found: Outcome, saved: Path | None) -> None:
    """What was chosen: the budget, and of each round what was predicted and measured."""
    allocation = found.allocation
    out.print(
        f"budget       {allocation.limit.asked}: {allocation.total:,} of at most {allocation.limit.nbytes:,} bytes",
        markup=False,
    )
    if allocation.cache:
        out.print(
            f"KV cache     {allocation.cache}, {allocation.cache_nbytes:,} bytes (context {found.target.context}, "
            f"batch {found.target.batch}); the checkpoint {allocation.nbytes:,}",
            markup=False,
        )
    caches = ["KV cache"] if allocation.cache else []
    rows = table("choice", "changed", "predicted KL", "measured KL", "bytes", *caches)
    for one in found.rounds:
        name = "by what weights lose alone" if one.number == 0 else f"round {one.number}"
        mark = ", taken" if one.allocation is allocation and len(found.rounds) > 1 else ""
        rows.add_row(
            name + mark,
            f"{one.changed}" if one.number else "",
            thousandths(one.predicted),
            thousandths(one.measured),
            f"{one.allocation.total:,}",
            *([one.allocation.cache] if caches else []),
        )
    if found.rounds:
        out.print(rows)
        out.print(
            "(in thousandths of a nat a token, on the text that it was chosen by: 'bitfold eval' on another)"
        )
    else:
        out.print(
            f"predicted KL {thousandths(allocation.predicted)} thousandths of a nat a token, not measured"
        )
    if allocation.packed_cache is not None:
        out.print(
            paragraph(
                f"The checkpoint doesn't hold the KV cache's format: run it with bitfold.QuantizedCache(model.config, "
                f"'{allocation.cache}'), and 'bitfold eval --kv {allocation.cache}'."
            )
        )
    if saved is not None:
        out.print(f"{saved}: recipe {found.recipe.name}, {len(found.recipe.rules)} rules", markup=False)
