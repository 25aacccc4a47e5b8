"""`bitfold generate MODEL --prompt TEXT`: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitfold import hub
from bitfold.cli.console import Activations, Device, Dtype, Json, load_model, print_json, say, say_cache
from bitfold.generate import generate as generate_text


def generate(
    model: Annotated[Path, typer.Argument(help="Directory of a model, quantized or not, or a GGUF file.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draw, with a temperature above 0.")] = 0,
    dtype: Dtype = "",
    activations: Activations = "",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Continue a prompt, showing the text as it comes; the speed is told at the end."""
    tokenizer = hub.load_tokenizer(model)
    loaded = load_model(model, device, dtype, activations)
    say_cache(model)
    shown: list[str] = []

    def show(text: str) -> None:
        sys.stdout.write(text if shown else prompt + text)
        sys.stdout.flush()
        shown.append(text)

    result = generate_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on_text=None if json else show,
    )
    if json:
        print_json({"model": model, **vars(result)})
        return
    print()
    speed = f", {result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else ""
    say(f"({result.tokens} tokens in {result.seconds:.2f} s{speed})")
