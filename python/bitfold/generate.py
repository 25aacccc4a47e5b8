"""Writing text with a causal language model, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitfold import hf
from bitfold.fields import shown


@dataclass(frozen=True)
class Generation:
    """What was generated. text: without the prompt; tokens: how many were made.

    seconds: from the prompt to the last token; tokens_per_second: of the tokens after the first, which is the
    speed of decoding without reading the prompt (None for fewer than two tokens).
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float | None


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: a transformers causal language model, quantized or not.
        tokenizer: its tokenizer.
        prompt: the text to continue; special tokens (BOS) are added as the tokenizer does.
        max_new_tokens: when to stop, unless the model ends earlier.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn at that temperature.
        seed: of the drawing; the global generators are left as they were.
        on_text: told each piece of text when it is complete.

    Raises ValueError where an argument is out of range, the prompt has no tokens or one that the embedding has no row
    for, or the model's configuration has something else in the place of a token's number.
    """
    transformers = hf.require_transformers()
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, it must not be negative")
    _check_settings(model.generation_config)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(next(model.parameters()).device)
    count = inputs["input_ids"].shape[1]
    if count == 0:
        raise ValueError("the prompt has no tokens, it must have at least one")
    hf.check_tokens(model, inputs["input_ids"])

    text_streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    text_streamer.on_finalized_text = lambda text, stream_end=False: (
        on_text(text) if on_text and text else None
    )
    clock = _Clock(text_streamer, [])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    with torch.inference_mode(), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        ids = model.generate(  # type: ignore[operator]
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            output_attentions=False,
            output_hidden_states=False,
            return_dict_in_generate=False,  # whatever the model's generation_config.json says
            pad_token_id=_pad_token(model, tokenizer),
            streamer=clock,
        )
    seconds = time.perf_counter() - start
    new = ids[0, count:]
    times = clock.times
    speed = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(prompt, text, count, len(new), seconds, speed)


def _check_settings(settings: Any) -> None:
    """Of the model's generation_config, which transformers takes as it is."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, name, None)
        if value is not None and not all(
            type(one) is int for one in (value if isinstance(value, list) else [value])
        ):
            raise ValueError(
                f"the model's {name} is {shown(value)}; it must be the number of a token, or a list of them"
            )


@dataclass(frozen=True)
class _Clock:
    """A streamer of transformers that notes when the prompt and then each token came."""

    streamer: Any
    times: list[float]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _pad_token(model: nn.Module, tokenizer: Any) -> int | None:
    """Named so that transformers doesn't warn; one prompt needs no padding."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id


def _devices(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
