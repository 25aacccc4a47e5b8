"""Saving and loading: what comes back is what was saved, as a whole or not at all, mapped and not copied."""

from __future__ import annotations

import copy
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import bitfold
import pytest
import safetensors.torch
import tiny
import torch
from bitfold import hf
from bitfold.embeddings import QuantEmbedding
from bitfold.nn import QuantLinear, QuantModule
from bitfold.recipes import Recipe, Rule
from bitfold.shards import CheckpointError, ShardWriter, TensorSpec, plan_shards, read_header, shard_names
from bitfold.writer import CheckpointWriter
from tiny import one_thread  # noqa: F401
from torch import nn

IDS = torch.arange(40).remainder(tiny.VOCAB)[None]
TIED_INT8 = Recipe(
    "tied", "", (Rule("lm_head", "int8"), Rule("*.embed_tokens", "int8"), Rule("*", "int4-g32"))
)


def generate(model: nn.Module, tokens: int = 8) -> list[int]:
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[0].tolist()


def planes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{plane}": tensor
        for name, module in model.named_modules()
        if isinstance(module, QuantModule)
        for plane, tensor in module.qtensor.planes.items()
    }


@pytest.fixture(scope="module")
def eight_layers() -> nn.Module:
    return tiny.llama(torch.bfloat16, layers=8, hidden=512, ffn=1024)


@pytest.mark.parametrize("recipe", ["int4-mixed", "nf4-dq", "fp8", "fp8-block", "fp8-w8a8"])
def test_eight_layer_llama_generates_the_same_after_save_and_load(eight_layers, recipe, tmp_path):
    model = copy.deepcopy(eight_layers)
    bitfold.quantize(model, recipe, quiet=True)
    with torch.no_grad():
        before = model(IDS).logits
    written = generate(model)
    bitfold.save(model, tmp_path / "q", recipe=recipe)
    loaded = bitfold.load(tmp_path / "q")
    assert not loaded.training
    for name, plane in planes(model).items():
        assert torch.equal(plane.view(torch.uint8), planes(loaded)[name].view(torch.uint8)), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, before)
    assert generate(loaded) == written


def test_loaded_tensors_are_mapped_from_the_file(tmp_path):
    model = tiny.llama()
    bitfold.quantize(model, "int4-g32", quiet=True)
    bitfold.save(model, tmp_path / "q")
    loaded = bitfold.load(tmp_path / "q")
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = line.split()[0].split("-")
        maps.append((int(start, 16), int(stop, 16), line.split(maxsplit=5)[-1]))
    file = str((tmp_path / "q" / "model.safetensors").resolve())
    for name, tensor in loaded.named_parameters():
        where = next(path for start, stop, path in maps if start <= tensor.data_ptr() < stop)
        assert where == file, name


def test_no_dense_weight_remains(tmp_path):
    model = tiny.llama()
    bitfold.quantize(model, "int4-g32", quiet=True)
    bitfold.save(model, tmp_path / "q")
    loaded = bitfold.load(tmp_path / "q")
    assert not [name for name, m in loaded.named_modules() if type(m) is nn.Linear and name != "lm_head"]
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 14


def test_buffers_that_are_not_stored_are_made_anew(tmp_path):
    model = tiny.llama(torch.bfloat16)
    rotary = model.model.rotary_emb.inv_freq.clone()
    bitfold.quantize(model, "int8", quiet=True)
    bitfold.save(model, tmp_path / "q")
    loaded = bitfold.load(tmp_path / "q")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, rotary)
    assert not [name for name, tensor in loaded.named_buffers() if tensor.is_meta]


def test_shards_hold_what_one_file_holds(tmp_path):
    model = tiny.llama()
    bitfold.quantize(model, "nf4", quiet=True)
    bitfold.save(model, tmp_path / "one")
    bitfold.save(model, tmp_path / "many", shard_bytes=50_000)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all(
        path.stat().st_size < 60_000 or len(read_header(path)) == 1
        for path in (tmp_path / "many").glob("*.safetensors")
    )
    one, many = tiny.tensors_of(tmp_path / "one"), tiny.tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    assert generate(bitfold.load(tmp_path / "many")) == generate(model)


def test_config_names_every_module(tmp_path):
    model = tiny.llama(torch.float16)
    bitfold.quantize(model, "int4-g32", quiet=True)
    bitfold.save(model, tmp_path / "q", recipe="int4-g32")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    section = config["quantization_config"]
    assert (section["quant_method"], section["format_version"], section["recipe"]) == (
        "bitfold",
        1,
        "int4-g32",
    )
    assert section["bitfold_version"] == bitfold.__version__
    assert len(section["modules"]) == 14
    assert section["modules"]["model.layers.1.mlp.down_proj"] == {
        "kind": "linear",
        "format": "int4-g32",
        "shape": [64, 128],
        "layout": "rows",
    }
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("recipe", ["int4-g32", TIED_INT8], ids=["kept", "quantized"])
def test_tied_weights_are_stored_once_and_stay_tied(recipe, tmp_path):
    model = tiny.llama(tied=True)
    bitfold.quantize(model, recipe, quiet=True)
    written = generate(model)
    bitfold.save(model, tmp_path / "q")
    assert not [name for name in tiny.tensors_of(tmp_path / "q") if name.startswith("lm_head")]
    loaded = bitfold.load(tmp_path / "q")
    head, embedding = loaded.lm_head, loaded.model.embed_tokens
    if recipe is TIED_INT8:
        assert isinstance(head, QuantLinear)
        assert isinstance(embedding, QuantEmbedding)
        assert head.codes is embedding.codes
        assert head.scales is embedding.scales
    else:
        assert head.weight is embedding.weight
    assert generate(loaded) == written


def test_compute_dtype_can_be_chosen(tmp_path):
    model = tiny.llama(torch.bfloat16)
    bitfold.quantize(
        model, Recipe("r", "", (Rule("*.embed_tokens", "int8"), Rule("*", "int4-g32"))), quiet=True
    )
    bitfold.save(model, tmp_path / "q")
    stored = planes(bitfold.load(tmp_path / "q"))
    loaded = bitfold.load(tmp_path / "q", dtype=torch.float32)
    assert loaded.model.norm.weight.dtype == torch.float32
    assert loaded.model.embed_tokens.dtype == torch.float32
    for name, plane in planes(loaded).items():
        assert torch.equal(plane, stored[name])
    with torch.no_grad():
        assert loaded(IDS).logits.dtype == torch.float32
    assert bitfold.load(tmp_path / "q").model.embed_tokens.dtype == torch.bfloat16


class Plain(nn.Module):
    """No transformers model: biases, a persistent and a non-persistent buffer, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.blocks = nn.ModuleList([nn.Linear(48, 48, bias=i == 0) for i in range(2)])
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.arange(3.0))
        self.register_buffer("phase", torch.linspace(0, 1, 48), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.phase + self.seen.sum()
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def test_any_torch_model(tmp_path):
    torch.manual_seed(1)
    model = Plain()
    model.seen += 5
    bitfold.quantize(model, "int4-g16", quiet=True)
    bitfold.save(model, tmp_path / "q")
    ids = torch.arange(50)
    with torch.no_grad():
        before = model(ids)
        loaded = bitfold.load(tmp_path / "q", model=Plain())
        assert torch.equal(loaded(ids), before)
    assert loaded.head.weight is loaded.embed.weight
    with pytest.raises(CheckpointError, match="model="):
        bitfold.load(tmp_path / "q")


def test_flat_layout(tmp_path):
    """What bitsandbytes lays out across rows stays so."""
    torch.manual_seed(1)
    model = Plain()
    flat = bitfold.encode(torch.randn(1, 48 * 48), "nf4-b64")
    model.blocks[1] = QuantLinear(bitfold.QTensor("nf4-b64", (48, 48), flat.planes, "flat"))
    bitfold.save(model, tmp_path / "q")
    loaded = bitfold.load(tmp_path / "q", model=Plain())
    assert loaded.blocks[1].layout == "flat"
    ids = torch.arange(50)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_model_to_load_into_must_fit(tmp_path):
    model = Plain()
    bitfold.quantize(model, "int8", quiet=True)
    bitfold.save(model, tmp_path / "q")
    other = Plain()
    other.blocks = nn.ModuleList([nn.Linear(48, 48)])
    with pytest.raises(CheckpointError, match=r"blocks\.1"):
        bitfold.load(tmp_path / "q", model=other)
    other = Plain()
    other.blocks[1] = nn.Linear(48, 24)
    with pytest.raises(CheckpointError, match=r"blocks\.1.*\[48, 48\].*\[24, 48\]"):
        bitfold.load(tmp_path / "q", model=other)


def test_tokenizer_files_go_along(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    (source / "merges.txt").write_text("x")
    (source / "modeling.py").write_text("raise SystemExit")
    model = tiny.llama()
    bitfold.quantize(model, "int8", quiet=True)
    bitfold.save(model, tmp_path / "q", tokenizer_from=source)
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "merges.txt", "generation_config.json"} <= names
    assert "modeling.py" not in names
    assert hf.load_tokenizer(tmp_path / "q")("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]


# Never half a checkpoint.


def saved(path: Path, seed: int = 0, **options) -> nn.Module:
    model = tiny.llama(seed=seed)
    bitfold.quantize(model, "int8", quiet=True)
    bitfold.save(model, path, **options)
    return model


def test_nothing_is_overwritten_without_force(tmp_path):
    saved(tmp_path / "q")
    before = tiny.tensors_of(tmp_path / "q")
    with pytest.raises(CheckpointError, match="exists"):
        saved(tmp_path / "q", seed=1)
    after = tiny.tensors_of(tmp_path / "q")
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = saved(tmp_path / "q", seed=1, force=True)
    assert generate(bitfold.load(tmp_path / "q")) == generate(model)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_force_replaces_checkpoints_only(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("once")
    with pytest.raises(CheckpointError, match="no bitfold checkpoint"):
        saved(precious, force=True)
    assert (precious / "chapter1.txt").read_text() == "once"
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="no directory"):
        saved(tmp_path / "file", force=True)


def test_an_empty_directory_is_free(tmp_path):
    (tmp_path / "q").mkdir()
    saved(tmp_path / "q")
    bitfold.load(tmp_path / "q")


def test_error_midway_leaves_nothing(tmp_path):
    specs = [TensorSpec("a", torch.float32, (4,)), TensorSpec("b", torch.float32, (4,))]

    def run() -> None:
        with CheckpointWriter(tmp_path / "q", specs) as writer:
            writer.write("a", torch.zeros(4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert list(tmp_path.iterdir()) == []


def test_unwritten_tensors_are_noticed(tmp_path):
    specs = [TensorSpec("a", torch.float32, (4,)), TensorSpec("b", torch.float32, (4,))]

    def run() -> None:
        with CheckpointWriter(tmp_path / "q", specs) as writer:
            writer.write("a", torch.zeros(4))
            writer.commit({})

    with pytest.raises(RuntimeError, match="'b'"):
        run()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import bitfold.writer
from bitfold.pipeline import quantize_checkpoint
source, target, when, force = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if when == "rename":
    bitfold.writer.os.rename = die
    quantize_checkpoint(source, target, "int8", force=bool(force))
elif when == "config":
    bitfold.writer.CheckpointWriter.commit = die
    quantize_checkpoint(source, target, "int8", force=bool(force))
else:
    count = [0]
    def progress(name, done, total):
        count[0] += 1
        if count[0] == int(when):
            die()
    quantize_checkpoint(source, target, "int8", force=bool(force), shard_bytes=40_000, progress=progress)
"""


@pytest.mark.parametrize(("when", "force"), [("1", ""), ("9", ""), ("config", ""), ("rename", "force")])
def test_a_killed_run_leaves_nothing_that_looks_whole(when, force, tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    home = tmp_path / "home"
    home.mkdir()
    old = None
    if force:
        saved(home / "q", seed=3)
        old = tiny.tensors_of(home / "q")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, home / "q", when, force], capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()
    left = [path for path in home.iterdir() if path.name != "q"]
    assert len(left) == 1, "the killed run was to leave its partial directory"
    assert left[0].name.startswith(".q.partial-")
    if when != "rename":
        assert not (left[0] / "config.json").exists()
        with pytest.raises(CheckpointError):
            bitfold.load(left[0])
    if old is None:
        assert not (home / "q").exists()
    else:
        now = tiny.tensors_of(home / "q")
        assert all(torch.equal(old[name], now[name]) for name in old)
    bitfold.quantize_checkpoint(source, home / "q", "int8", force=bool(force))
    assert [path.name for path in home.iterdir()] == ["q"], "the next run removes what the killed one left"


TERMINATED = """
import os, signal, sys
from bitfold.cli import main
from bitfold.writer import CheckpointWriter
CheckpointWriter.commit = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
main()
"""


def test_a_terminated_run_clears_away(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    command = [sys.executable, "-c", TERMINATED, "quantize", source, tmp_path / "home" / "q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert list((tmp_path / "home").iterdir()) == []


def test_a_running_neighbour_is_left_alone(tmp_path):
    specs = [TensorSpec("a", torch.float32, (4,))]

    def run() -> None:
        with (
            CheckpointWriter(tmp_path / "q", specs) as first,
            CheckpointWriter(tmp_path / "q", specs) as second,
        ):
            first.write("a", torch.ones(4))
            second.write("a", torch.zeros(4))
            first.commit({})
            second.commit({})

    with pytest.raises(CheckpointError, match="come into being"):
        run()
    assert torch.equal(tiny.tensors_of(tmp_path / "q")["a"], torch.ones(4))
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_files_have_the_usual_permissions(tmp_path):
    saved(tmp_path / "q")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((tmp_path / "q" / "model.safetensors").stat().st_mode) == 0o666 & ~mask


# The container.


def test_streamed_file_is_what_the_library_reads(tmp_path, rng):
    dtypes = [
        torch.uint8,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.float8_e4m3fn,
        torch.bool,
    ]
    tensors = {}
    for i, dtype in enumerate(dtypes):
        raw = torch.from_numpy(rng.integers(0, 2, (3, 8 * (i + 1) + 1), dtype="uint8"))
        tensors[f"t{i}"] = raw.to(dtype)
    tensors["empty"] = torch.empty(0, 5)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["view"] = torch.arange(12.0).view(3, 4).t()
    writer = ShardWriter(tmp_path / "f", [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    assert writer.complete
    writer.close()
    read = safetensors.torch.load_file(tmp_path / "f")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].to(torch.float32), tensor.to(torch.float32)), name
    header = read_header(tmp_path / "f")
    assert {name: (stored.torch_dtype, stored.shape) for name, stored in header.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }


def test_tensors_lie_at_multiples_of_their_element_size(tmp_path):
    specs = [
        TensorSpec("a", torch.uint8, (3,)),
        TensorSpec("b", torch.float32, (5,)),
        TensorSpec("c", torch.int64, (1,)),
    ]
    writer = ShardWriter(tmp_path / "f", specs)
    for spec in specs:
        writer.write(spec.name, torch.zeros(spec.shape, dtype=spec.dtype))
    writer.close()
    raw = (tmp_path / "f").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert start % 64 == 0
    for spec in specs:
        assert (start + header[spec.name]["data_offsets"][0]) % spec.dtype.itemsize == 0


def test_shards_keep_order_and_limit():
    specs = [TensorSpec(str(i), torch.uint8, (size,)) for i, size in enumerate([5, 5, 20, 1, 9, 1])]
    shards = plan_shards(specs, 10)
    assert [[spec.nbytes for spec in shard] for shard in shards] == [[5, 5], [20], [1, 9], [1]]
    assert shard_names(1) == ["model.safetensors"]
    assert all(re.fullmatch(r"model-0000\d-of-00004\.safetensors", name) for name in shard_names(4))
