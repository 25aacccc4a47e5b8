"""All that bitfold asks of transformers: models without weights, their configuration and tokenizers.

transformers is the extra `hf`; it is imported when one of these functions is called, never with bitfold
itself.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import versions
from bitfold.formats import floating_dtype
from bitfold.shards import CONFIG_FILE, CheckpointError, listed, read_directory, read_json

GENERATION_FILE = "generation_config.json"
_REASON = 200  # characters quoted of an error of transformers


def require_transformers() -> Any:
    """The transformers module. Raises MissingExtraError where it is not installed or not supported."""
    return versions.TRANSFORMERS.require("reading Hugging Face models")


def not_there(path: Path) -> CheckpointError:
    """For a path without a model; one that may be meant as a name on the Hugging Face Hub is told how to get that."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
    hint = f"; 'hf download {path} --local-dir DIR' fetches a model of this name from the Hugging Face Hub"
    return CheckpointError(f"{path} does not exist{hint if named else ''}")


def read_config(path: Path) -> dict:
    """config.json of a model directory. Raises CheckpointError where there is none."""
    if not path.exists():
        raise not_there(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; give the directory that holds {CONFIG_FILE}")
    return read_json(path / CONFIG_FILE)


def config_dtype(config: dict) -> torch.dtype:
    """The dtype that config.json names; float32 where it names none, as transformers has it."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    try:
        return floating_dtype(name)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG_FILE}: {error}") from None


def typed_config(path: Path, config: dict) -> Any:
    """config.json as transformers reads it, with the defaults of the model's type; path: where it is from.

    Raises CheckpointError where it names no type that transformers knows, or where transformers refuses it.
    """
    transformers = require_transformers()
    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    if "model_type" not in fields:
        raise CheckpointError(f"{_origin(path)} names no model_type")
    try:
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # whatever a configuration may make transformers raise
        raise CheckpointError(
            f"transformers can't read the configuration in {_origin(path)}: {reason(error)}"
        ) from error


def empty_causal_lm(path: Path, config: dict, dtype: torch.dtype) -> nn.Module:
    """The causal language model that config.json describes: parameters on the meta device, buffers real.

    path: the directory of config.json, or the file that says the same. Raises CheckpointError where transformers
    doesn't know the architecture or refuses the configuration.
    """
    transformers = require_transformers()
    typed = typed_config(path, config)
    try:
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(typed, dtype=dtype)
    except Exception as error:  # whatever a configuration may make transformers raise
        raise CheckpointError(
            f"transformers can't make a causal model of {_origin(path)}: {reason(error)}"
        ) from error
    if (path / GENERATION_FILE).exists():
        model.generation_config = _generation_config(path)
    model.tie_weights()
    return model


def _generation_config(path: Path) -> Any:
    try:
        return require_transformers().GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a file may make transformers raise
        raise CheckpointError(f"transformers can't read {path / GENERATION_FILE}: {reason(error)}") from error


def _origin(path: Path) -> Path:
    """The file that a configuration is from."""
    return path if path.is_file() else path / CONFIG_FILE


@dataclass(frozen=True)
class CacheShape:
    """What a token leaves in the KV cache.

    windows: for each layer with a cache how many tokens it keeps, None for all of them; heads, head_dim: of the
    keys, and as many of the values.
    """

    windows: tuple[int | None, ...]
    heads: int
    head_dim: int

    def numbers(self, context: int) -> int:
        """Keys and values that a sequence of `context` tokens leaves, over all layers."""
        tokens = sum(context if window is None else min(window, context) for window in self.windows)
        return 2 * tokens * self.heads * self.head_dim


def longest_context(config: Any) -> int | None:
    """Tokens that a model was made for, None where its configuration, as transformers reads it, doesn't tell."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def context_up_to(config: Any, most: int) -> int:
    """Tokens that a model was made for, at most so many."""
    return min(longest_context(config) or most, most)


def cache_shape(config: Any) -> CacheShape:
    """The KV cache of a model, from its configuration as transformers reads it.

    Raises ValueError where the configuration describes no ordinary attention in all of its layers.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            "its attention keeps compressed keys and values (kv_lora_rank), which bitfold can't size"
        )
    try:
        layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
        head_dim = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    except (AttributeError, TypeError) as error:
        raise ValueError(f"its configuration has no attention heads ({error})") from None
    window = getattr(text, "sliding_window", None)
    # Where layers have no kinds (Mistral), a window is one of all of them, as transformers' caches read it.
    kinds = (
        getattr(text, "layer_types", None)
        or ["full_attention" if window is None else "sliding_attention"] * layers
    )
    windows: list[int | None] = []
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"it has layers of the kind {kind!r}, which bitfold can't size")
        windows.append(window if kind == "sliding_attention" else None)
    shared = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        shared = 1  # Falcon, GPTBigCode: all heads share one
    return CacheShape(tuple(windows), int(shared), int(head_dim))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as it is registered, in this thread.

    Building under torch.device("meta") would empty the buffers as well, and those that are not in checkpoints
    (the rotary frequencies) could not be filled again in general.
    """
    original = nn.Module.register_parameter
    owner = threading.get_ident()

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and threading.get_ident() == owner:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def ignored_names(model: nn.Module) -> re.Pattern[str]:
    """Names of tensors that may lie in a checkpoint of this architecture without being used.

    What the architecture itself declares, and the rotary frequencies that old Llama checkpoints carry.
    """
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return re.compile("|".join([r"rotary_emb\.inv_freq$", *sorted(declared)]))


def load_causal_lm(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """An unquantized model through transformers, in eval mode, in the dtype it is stored in unless another is
    given.

    Raises CheckpointError for a directory that is no model, whose files are missing or truncated, or that lacks tensors
    of the model or has them in other shapes, which transformers would fill with random numbers.
    """
    transformers = require_transformers()
    path = Path(path)
    config = read_config(path)
    read_directory(path)  # for its error messages
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or config_dtype(config),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a model directory may make transformers raise
        raise CheckpointError(f"transformers can't load {path}: {reason(error)}") from error
    if other := sorted(info["mismatched_keys"]):
        name, stored, wanted = other[0]
        raise CheckpointError(
            f"{path}: tensor '{name}' has shape {list(stored)}, but config.json makes it {list(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{path} lacks {listed(missing)}, which the model of its config.json has")
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory. Raises CheckpointError where there is none that transformers can
    read.
    """
    transformers = require_transformers()
    path = Path(path)
    read_config(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's files may make transformers raise
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can read: {reason(error)}"
        ) from error


def check_tokens(model: nn.Module, ids: Tensor) -> None:
    """Raises ValueError where a transformers model has no row of its embedding for a token: torch's own answer is an
    IndexError on the CPU, and on a GPU a fault behind which the process can't use it any more."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", None)
    largest = int(ids.max()) if ids.numel() else 0
    if rows is not None and largest >= rows:
        raise ValueError(
            f"the text has the token {largest}, and the model's embedding has {rows} rows; the tokenizer must be the "
            "model's own"
        )


def reason(error: Exception) -> str:
    """What another library says, on one line and not too long."""
    text = " ".join(str(error).split())
    return (text[:_REASON] + " ..." if len(text) > _REASON else text).rstrip(".") or type(error).__name__
