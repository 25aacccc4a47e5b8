"""`bitfold eval MODEL --text FILE [--base MODEL]`: perplexity, and the distance from the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from bitfold import hub
from bitfold.calibration.overlap import NOTABLE, share_seen
from bitfold.cli.console import (
    Activations,
    Device,
    Dtype,
    Json,
    estimate,
    load_model,
    out,
    print_json,
    progress,
    say,
    say_cache,
)
from bitfold.evaluate import Comparison, Perplexity, compare, compute_dtype, cut, default_context, perplexity
from bitfold.kv.blocks import FORMATS
from bitfold.kv.through import Through
from bitfold.text import size


def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a model, quantized or not, or a GGUF file.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to measure on.")],
    base: Annotated[Path | None, typer.Option(help="The unquantized model to compare with.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window; 0: the model's, at most 2048.")] = 0,
    stride: Annotated[int, typer.Option(help="Tokens that a window scores; 0: as many as fit.")] = 0,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="BOS in front of each window; default: as the tokenizer does."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Use the first tokens of the text only; 0: all.")] = 0,
    dtype: Dtype = "",
    activations: Activations = "",
    kv: Annotated[
        str,
        typer.Option(
            help=f"Run through a KV cache in {', '.join(FORMATS)}, as decoding does; without --base compared with the "
            "same model and a cache in its own dtype."
        ),
    ] = "",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure perplexity and bits per byte; with --base also KL divergence and top-1 agreement."""
    data = read_text(text)
    tokenizer = hub.load_tokenizer(base if base is not None else model)
    subject = load_model(model, device, dtype, activations)
    say_cache(model, kv)
    reference: nn.Module | None = load_model(base, device, dtype) if base is not None else None
    cached: Through | None = None
    if kv:
        cached = Through(subject, kv)
        cached.new_cache()  # a format or a model that can't be is said before anything runs
        reference = Through(subject if reference is None else reference, None)
    windows = cut(
        data,
        tokenizer,
        context=context or default_context(subject),
        stride=stride or None,
        bos=bos,
        dtype=compute_dtype(subject),
        max_tokens=max_tokens or None,
    )
    overlap = share_seen(model, windows.ids)
    if overlap is not None and overlap >= NOTABLE:
        say(
            f"warning: {model} was calibrated on {overlap:.0%} of the passages of this text, or its formats were "
            "chosen by them, so the figures flatter it: measure on another text"
        )
    result: Perplexity | Comparison
    with progress("evaluating") as update:
        if reference is None:
            result = perplexity(subject, windows, progress=lambda done, total: update("", done, total))
        else:
            result = compare(
                reference,
                subject if cached is None else cached,
                windows,
                progress=lambda done, total: update("", done, total),
            )
    if json:
        print_json(
            {
                "model": model,
                "base": base,
                "text": text,
                "calibration_overlap": overlap,
                **({} if cached is None else {"kv": kv, "kv_bytes": cached.nbytes}),
                **_fields(result),
            }
        )
        return
    out.print(f"protocol     {result.protocol}")
    own = result.model if isinstance(result, Comparison) else result
    out.print(f"perplexity   {estimate(own.perplexity)}")
    out.print(f"bits/byte    {own.bits_per_byte:.4f}")
    if cached is not None:
        out.print(f"KV cache     {kv}, {size(cached.nbytes)} after the last window")
    if isinstance(result, Comparison):
        out.print(
            f"base         {estimate(result.base.perplexity)}, {result.base.bits_per_byte:.4f} bits/byte"
        )
        out.print(f"mean KL      {estimate(result.mean_kl)} nats")
        out.print(f"99 % KL      {estimate(result.p99_kl)} nats")
        out.print(f"same top-1   {estimate(result.top1)}")


def read_text(path: Path) -> str:
    """A text that an option names. Raises ValueError where it is no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} doesn't fit") from None


def _fields(result: Perplexity | Comparison) -> dict[str, object]:
    """The result's numbers; the sums of single windows stay out."""
    return {k: v for k, v in vars(result).items() if not k.startswith("window_")}
