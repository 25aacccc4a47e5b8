"""bitfold's GGUF files in llama.cpp itself: its own quantizer's bytes, its reading of text, of weights, of tokens.

Needs the package llama-cpp-python (the extra `interop`; it builds llama.cpp when it is installed).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import bitfold
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama_cpp is not installed: pip install bitfold[interop]"
)
gguf = pytest.importorskip("gguf")
from bitfold.gguf import mixes  # noqa: E402
from bitfold.gguf.export import read_directory  # noqa: E402
from bitfold.gguf.quantize import quantize_gguf  # noqa: E402
from bitfold.gguf.reader import read_gguf  # noqa: E402

DEMO = Path(__file__).parents[2] / "examples" / "demo"
MODEL = DEMO / "model"
CONTEXT = 256  # tokens of a window whose perplexity is measured
WINDOWS = 6
MIXES = ("q8_0", "q4_k_m", "q2_k", "q3_k_m", "q5_k_s", "q6_k", "q4_0", "q5_1", "iq4_nl", "iq4_xs")
PROMPT = "Once upon a time"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the demo is not beside the tests")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    """The demo model in F16, as it is stored."""
    quantize_gguf(read_directory(MODEL), folder / "f16.gguf", "f16")
    return folder / "f16.gguf"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def heldout() -> str:
    return (DEMO / "heldout.txt").read_text(encoding="utf-8")[:8000]


def ours(folder: Path, mix: str) -> Path:
    """Made by bitfold, from the Hugging Face directory."""
    path = folder / f"ours-{mix}.gguf"
    if not path.is_file():
        quantize_gguf(read_directory(MODEL), path, mix)
    return path


def theirs(plain: Path, mix: str) -> Path:
    """Made by llama.cpp's quantizer, from the F16 file."""
    path = plain.parent / f"theirs-{mix}.gguf"
    if not path.is_file():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = mixes.get(mix).number
        parameters.nthread = 1
        done = llama_cpp.llama_model_quantize(bytes(plain), bytes(path), ctypes.byref(parameters))
        assert done == 0
    return path


def model(path: Path, **options):
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **options)


def tokens_of(llama, text: str) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=True, special=False)


def losses_of(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of the second half of a window: logits [tokens, vocabulary] of all of it, its ids."""
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return losses[len(losses) // 2 :].double()


def perplexity(ids: list[int], logits_of: Callable[[list[int]], torch.Tensor]) -> float:
    """Of so many windows, each read from its beginning."""
    windows = [ids[i * CONTEXT : (i + 1) * CONTEXT] for i in range(WINDOWS)]
    assert len(windows[-1]) == CONTEXT
    return torch.cat([losses_of(logits_of(window), window) for window in windows]).mean().exp().item()


def reading(path: Path) -> Callable[[list[int]], torch.Tensor]:
    """Tokens to logits, by llama.cpp."""
    llama = model(path, logits_all=True)

    def logits_of(ids: list[int]) -> torch.Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.tensor(np.array(llama.scores[: len(ids)]))

    return logits_of


def greedy(path: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens that follow, by llama.cpp."""
    llama = model(path, logits_all=True)
    given, found = list(ids), []
    for _ in range(count):
        llama.eval(given)
        given = [int(np.argmax(llama.scores[llama.n_tokens - 1]))]
        found += given
    return found


@pytest.mark.parametrize("mix", MIXES)
def test_the_bytes_of_its_quantizer(folder, plain, mix):
    """Types, shapes and bytes of every tensor, in the same order."""
    mine, other = (gguf.GGUFReader(path).tensors for path in (ours(folder, mix), theirs(plain, mix)))
    assert [tensor.name for tensor in mine] == [tensor.name for tensor in other]
    for one, two in zip(mine, other, strict=True):
        assert (one.tensor_type, list(one.shape)) == (two.tensor_type, list(two.shape)), one.name
        assert one.data.tobytes() == two.data.tobytes(), one.name
    assert len({tensor.tensor_type for tensor in mine}) > 1


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_text_and_perplexity(folder, plain, tokenizer, heldout, mix):
    mine, other = ours(folder, mix), theirs(plain, mix)
    prompt = tokenizer(PROMPT)["input_ids"]
    assert greedy(mine, prompt, 64) == greedy(other, prompt, 64)
    ids = tokenizer(heldout)["input_ids"]
    assert perplexity(ids, reading(mine)) == pytest.approx(perplexity(ids, reading(other)), rel=1e-4)


def test_it_says_what_the_model_says_in_torch(plain, tokenizer, heldout):
    """Unquantized: names, the order of rows and the metadata are right where both say the same."""
    prompt = tokenizer(PROMPT)["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    out = found.generate(torch.tensor([prompt]), max_new_tokens=48, min_new_tokens=48, do_sample=False)
    assert greedy(plain, prompt, 48) == out[0, len(prompt) :].tolist()
    ids = tokenizer(heldout)["input_ids"]
    with torch.inference_mode():
        in_torch = perplexity(ids, lambda window: found(torch.tensor([window])).logits[0])
    assert perplexity(ids, reading(plain)) == pytest.approx(in_torch, rel=1e-3)


@pytest.mark.parametrize("mix", ["q8_0", "q4_k_m"])
def test_bitfold_runs_what_it_runs(folder, tokenizer, heldout, mix):
    """llama.cpp rounds activations to 8 bits, bitfold doesn't: less than half a percent of the perplexity."""
    path = ours(folder, mix)
    ids = tokenizer(heldout)["input_ids"]
    found = bitfold.load(path)
    with torch.inference_mode():
        here = perplexity(ids, lambda window: found(torch.tensor([window])).logits[0])
    assert here == pytest.approx(perplexity(ids, reading(path)), rel=5e-3)


def test_token_ids_are_those_of_the_tokenizer(plain, tokenizer, heldout):
    llama = model(plain, vocab_only=True)
    texts = [heldout[i : i + 300] for i in range(0, 30000, 3000)]
    texts += [
        "",
        " ",
        "  two  spaces ",
        "\n\n\ttabs\n",
        "12345 67",
        "don't we'll",
        "ÄÖÜ é ñ",
        "日本語 🙂",
        "a" * 200,
    ]
    for text in texts:
        assert (
            llama.tokenize(text.encode(), add_bos=False, special=False)
            == (tokenizer(text, add_special_tokens=False)["input_ids"])
        ), text
        assert tokens_of(llama, text) == tokenizer(text)["input_ids"], text


def test_it_is_read_as_it_was_written(plain):
    """llama.cpp's own file and bitfold's reader: every tensor has the bytes that the gguf package sees."""
    path = theirs(plain, "q4_k_m")
    found = read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        mine = found.tensors[tensor.name]
        assert (
            mine.read(0, mine.rows).contiguous().view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
        )
