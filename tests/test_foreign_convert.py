"""Directories of other libraries: made of bitfold's, loaded, converted into each other and back, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

import bitfold  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from bitfold.convert import convert_checkpoint, kind_of  # noqa: E402
from bitfold.foreign.convert import convert as convert_directory  # noqa: E402
from bitfold.foreign.owners import OWNERS  # noqa: E402
from bitfold.foreign.source import open_source  # noqa: E402
from bitfold.foreign.targets import TARGETS  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402
from command import call, call_json  # noqa: E402
from tiny import one_thread  # noqa: E402, F401

IDS = torch.randint(0, tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
UP = "model.layers.0.mlp.up_proj"

# A format of bitfold's -> the targets that hold the same numbers, and the format that they have there.
EXACT = {
    "int4-g32": {
        "gptq": "int4-g32",
        "gptq-v2": "int4-g32",
        "awq": "int4-g32",
        "compressed-tensors": "int4-g32",
    },
    "int4-g64-asym": {
        "gptq": "int4-g64-asym",
        "gptq-v2": "int4-g64-asym",
        "awq": "int4-g64-asym",
        "compressed-tensors": "int4-g64-asym",
    },
    "int3-g32-asym": {
        "gptq": "int3-g32-asym",
        "gptq-v2": "int3-g32-asym",
        "compressed-tensors": "int3-g32-asym",
    },
    "int8-channel": {"gptq": "int8-channel", "gptq-v2": "int8-channel", "compressed-tensors": "int8-channel"},
    "int4-g64-sfp32": {"compressed-tensors": "int4-g64-sfp32"},
    "fp8": {"compressed-tensors": "fp8-e4m3-channel"},
    "fp8-w8a8": {"compressed-tensors": "fp8-e4m3-channel"},
    "fp8-block": {"compressed-tensors": "fp8-e4m3-b128x128", "fp8": "fp8-e4m3-b128x128"},
    "fp8-b32x64": {"compressed-tensors": "fp8-e4m3-b32x64", "fp8": "fp8-e4m3-b32x64"},
    "nf4-b64": {"bitsandbytes": "nf4-b64"},
    "fp4-b64-dq": {"bitsandbytes": "fp4-b64-dq"},
    "q8_0": {"gptq": "int8-g32", "compressed-tensors": "int8-g32"},
    "q4_0": {"awq": "int4-g32"},
}
PAIRS = [(format, target) for format, targets in EXACT.items() for target in targets]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("foreign") / "model", torch.float16, layers=1)


@pytest.fixture(scope="module")
def quantized(model):
    """The model in a format, made once."""
    made: dict[str, Path] = {}

    def quantize(format: str) -> Path:
        if format not in made:
            made[format] = model.parent / format
            bitfold.quantize_checkpoint(model, made[format], format)
        return made[format]

    return quantize


def logits(path: Path, activations: str | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return bitfold.load(path, dtype=torch.float32, activations=activations)(IDS).logits


def section(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def formats(path: Path) -> set[str]:
    return {
        module.format for module in bitfold.load(path).modules() if isinstance(module, bitfold.QuantLinear)
    }


def same_files(one: Path, other: Path) -> None:
    before, after = tiny.tensors_of(one), tiny.tensors_of(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )


@pytest.mark.parametrize(("format", "target"), PAIRS)
def test_there_and_back_is_the_same(format, target, quantized, tmp_path):
    """bitfold -> another's -> bitfold -> another's: exact, the same logits to the bit, the same files."""
    source = quantized(format)
    there = convert_checkpoint(source, tmp_path / "there", to=target)
    assert there.exact
    assert bool(there.remarks) == (target == "fp8" or (target == "gptq" and "asym" in EXACT[format][target]))
    assert kind_of(tmp_path / "there") == TARGETS[target].owner
    assert formats(tmp_path / "there") == {EXACT[format][target]}
    if format.startswith("q"):  # the kernel of blocks sums in another order
        assert (logits(tmp_path / "there") - logits(source)).abs().max() < 1e-5
    else:
        assert torch.equal(logits(tmp_path / "there"), logits(source))
    assert convert_checkpoint(tmp_path / "there", tmp_path / "back").exact
    if formats(source) == {EXACT[format][target]}:
        same_files(source, tmp_path / "back")
    assert convert_checkpoint(tmp_path / "back", tmp_path / "again", to=target).exact
    same_files(tmp_path / "there", tmp_path / "again")
    assert section(tmp_path / "again") == section(tmp_path / "there")
    assert (tmp_path / "there" / "tokenizer.json").is_file()
    assert (tmp_path / "there" / "quantize_config.json").is_file() == (TARGETS[target].owner == "gptq")
    stored = json.loads((tmp_path / "there" / "bitfold_conversion.json").read_text())
    assert stored["exact"]
    assert all(entry["exact"] and entry["largest"] == 0 for entry in stored["tensors"])


@pytest.mark.parametrize("one", ["gptq", "gptq-v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("other", ["gptq", "gptq-v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("format", ["int4-g32", "int4-g64-asym"])
def test_owners_convert_into_each_other(one, other, format, quantized, tmp_path):
    """A -> B -> A gives the same files."""
    convert_checkpoint(quantized(format), tmp_path / "a", to=one)
    assert convert_checkpoint(tmp_path / "a", tmp_path / "b", to=other).exact
    assert convert_checkpoint(tmp_path / "b", tmp_path / "again", to=one).exact
    same_files(tmp_path / "a", tmp_path / "again")
    assert section(tmp_path / "a") == section(tmp_path / "again")


@pytest.mark.parametrize(
    ("format", "target", "block"),
    [("int4-g64", "gptq", "q4_0"), ("int4-g32-asym", "awq", "q8_0"), ("int8-channel", "gptq", "q8_0")],
)
def test_gguf_files_hold_them(format, target, block, quantized, tmp_path):
    """Groups are cut into blocks that repeat the scale; codes with zero points need eight bits around 0."""
    pytest.importorskip("gguf")
    import gguf_models

    source = gguf_models.write_directory(tmp_path / "source", "llama", torch.float16)
    bitfold.quantize_checkpoint(source, tmp_path / "q", format)
    convert_checkpoint(tmp_path / "q", tmp_path / "a", to=target)
    assert convert_checkpoint(tmp_path / "a", tmp_path / "model.gguf").exact
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        loaded = bitfold.load(tmp_path / "model.gguf", dtype=torch.float32)
        one, two = loaded(ids).logits, bitfold.load(tmp_path / "a", dtype=torch.float32)(ids).logits
    found = {module.format for module in loaded.modules() if isinstance(module, bitfold.QuantLinear)}
    assert found == {block}
    assert (one - two).abs().max() < 2e-5 * two.abs().max()
    back = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back", to="gptq")
    assert back.exact


def test_decoded_weights_are_those(quantized, tmp_path):
    """--decode makes a directory that transformers alone computes the same with."""
    convert_checkpoint(quantized("int4-g64-asym"), tmp_path / "a", to="gptq")
    assert convert_checkpoint(tmp_path / "a", tmp_path / "plain", decode=torch.float32).exact
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.inference_mode():
        wanted = logits(tmp_path / "a")
        assert (plain(IDS).logits - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_rounding_must_be_asked_for(quantized, tmp_path):
    """nf4 has no place among integers; asked to, it is encoded anew, and the errors are told and stored."""
    with pytest.raises(CheckpointError, match="another grid than int4-g64; --allow-lossy"):
        convert_checkpoint(quantized("nf4-b64"), tmp_path / "a", to="gptq")
    assert not (tmp_path / "a").exists()
    result = convert_checkpoint(quantized("nf4-b64"), tmp_path / "a", to="gptq", allow_lossy=True)
    assert not result.exact
    assert result.remarks[0].startswith("7 weights")
    errors = {status.name: status.relative for status in result.tensors}
    assert 0.01 < errors[UP] < 0.12
    assert errors["model.norm.weight"] == 0
    # What is told is what is: the decoded weights, compared again.
    one, two = (
        bitfold.load(path).get_submodule(UP).qtensor.decode()
        for path in (quantized("nf4-b64"), tmp_path / "a")
    )
    assert errors[UP] == pytest.approx(((two - one).norm() / one.norm()).item(), rel=1e-5)


def test_scales_of_another_dtype(quantized, tmp_path):
    """bf16 scales are numbers of fp16 unless they are tiny; fp32 ones are not, and are rounded only when asked."""
    bitfold.quantize_checkpoint(quantized("int4-g32").parent / "model", tmp_path / "bf16", "int4-g32-sbf16")
    assert convert_checkpoint(tmp_path / "bf16", tmp_path / "gptq", to="gptq").exact
    with pytest.raises(CheckpointError, match="not all of its scales are numbers of float16"):
        convert_checkpoint(quantized("int4-g64-sfp32"), tmp_path / "b", to="gptq")
    result = convert_checkpoint(quantized("int4-g64-sfp32"), tmp_path / "b", to="gptq", allow_lossy=True)
    assert 0 < max(status.relative for status in result.tensors) < 2**-11  # codes are kept


def test_int8_of_bitsandbytes_says_what_it_rounds(quantized, tmp_path):
    """A scale of fp16 times 127 is a number of fp32, and w = q * SCB / 127 is w = q * scale; a scale of fp32 isn't."""
    assert convert_checkpoint(quantized("int8-channel"), tmp_path / "fp16", to="bitsandbytes").exact
    assert torch.equal(logits(tmp_path / "fp16", "float"), logits(quantized("int8-channel")))
    assert torch.equal(logits(tmp_path / "fp16"), logits(quantized("int8-channel"), "llm-int8"))
    source = quantized("int8-channel-sfp32")
    with pytest.raises(CheckpointError, match=r"SCB, scale \* 127, is rounded"):
        convert_checkpoint(source, tmp_path / "a", to="bitsandbytes")
    there = convert_checkpoint(source, tmp_path / "a", to="bitsandbytes", allow_lossy=True)
    assert 0 < max(status.relative for status in there.tensors) < 1e-7
    with pytest.raises(CheckpointError, match="the scale, SCB / 127, is rounded"):
        convert_checkpoint(tmp_path / "a", tmp_path / "back")
    wanted = logits(source)
    assert (logits(tmp_path / "a", "float") - wanted).abs().max() < 1e-5 * wanted.abs().max()


def with_order(path: Path, target: Path) -> Path:
    """A GPTQ checkpoint whose groups follow an order of columns."""
    convert_checkpoint(path, target, to="gptq")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            generator = torch.Generator().manual_seed(len(name))
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]

    tiny.rewrite(target, change)
    set_section(target, desc_act=True)
    return target


def test_an_order_of_columns(quantized, tmp_path):
    """g_idx stays what it is where it has a place; AWQ and GGUF have none, and say so."""
    source = with_order(quantized("int4-g32"), tmp_path / "source")
    module = bitfold.load(source).get_submodule(UP)
    assert module.g_idx is not None
    for target in ("bitfold", "gptq-v2"):
        assert convert_checkpoint(source, tmp_path / target, to=target).exact
        assert torch.equal(logits(tmp_path / target), logits(source))
        assert convert_checkpoint(tmp_path / target, tmp_path / f"{target}-back", to="gptq").exact
        same_files(source, tmp_path / f"{target}-back")
    assert section(tmp_path / "gptq-v2")["desc_act"] is True
    for target, words in (
        ("awq", "AWQ has no g_idx"),
        ("compressed-tensors", "compressed-tensors has had no g_idx"),
        ("bitsandbytes", "g_idx"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert_checkpoint(source, tmp_path / "none", to=target)
    assert not convert_checkpoint(source, tmp_path / "awq", to="awq", allow_lossy=True).exact


def test_layers_of_several_kinds(model, tmp_path):
    """What is kept stays plain, what has another format is said to have it; AWQ takes the smallest groups."""
    recipe = bitfold.Recipe(
        "mixed",
        "",
        (
            bitfold.Rule("*.down_proj", "int4-g64-asym"),
            bitfold.Rule("*.o_proj", None),
            bitfold.Rule("*_proj", "int4-g32"),
        ),
    )
    bitfold.quantize_checkpoint(model, tmp_path / "q", recipe)
    for target in ("gptq", "compressed-tensors", "awq"):
        result = convert_checkpoint(tmp_path / "q", tmp_path / target, to=target)
        assert result.exact
        assert torch.equal(logits(tmp_path / target), logits(tmp_path / "q"))
        after = {status.name.rpartition(".")[2]: status.after for status in result.tensors}
        assert after["down_proj"] == ("int4-g32-asym" if target == "awq" else "int4-g64-asym")
        assert convert_checkpoint(tmp_path / target, tmp_path / f"{target}-back", to="bitfold").exact
    assert section(tmp_path / "gptq")["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 4, "group_size": 64, "sym": False},
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
    }
    assert section(tmp_path / "awq")["modules_to_not_convert"] == [
        "model.layers.0.self_attn.o_proj",
        "lm_head",
    ]
    assert section(tmp_path / "compressed-tensors")["ignore"] == [
        "model.layers.0.self_attn.o_proj",
        "lm_head",
    ]


def test_tied_heads_and_shards(tmp_path):
    """A head that shares the embedding's weight isn't stored; files may be several."""
    source = tiny.write_llama(tmp_path / "model", torch.bfloat16, layers=2, tied=True, shard="60KB")
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int4-g32")
    for target in ("gptq", "awq", "bitsandbytes"):
        lossy = target == "bitsandbytes"
        result = convert_checkpoint(tmp_path / "q", tmp_path / target, to=target, allow_lossy=lossy)
        assert result.exact != lossy
        loaded = bitfold.load(tmp_path / target)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_the_command_line(quantized, tmp_path, capsys):
    """convert tells and stores; inspect lists; generate and eval load."""
    shown = call_json(capsys, "convert", quantized("int4-g32"), tmp_path / "awq", "--to", "awq")
    assert shown["exact"]
    assert (shown["from"], shown["to"]) == ("bitfold", "awq")
    listed = call_json(capsys, "inspect", tmp_path / "awq")
    assert listed["quant_method"] == "awq"
    rows = {row["name"]: row for row in listed["entries"]}
    assert (rows[UP]["format"], rows[UP]["shape"]) == ("int4-g32", [128, 64])
    assert rows["model.norm.weight"]["format"] == "F16"
    made = call_json(capsys, "generate", tmp_path / "awq", "--prompt", "The", "--max-new-tokens", "4")
    wanted = call_json(capsys, "generate", quantized("int4-g32"), "--prompt", "The", "--max-new-tokens", "4")
    assert made["text"] == wanted["text"]
    again = call_json(capsys, "convert", quantized("int4-g32"), tmp_path / "awq", "--to", "gptq", "--force")
    assert again["to"] == "gptq"
    assert kind_of(tmp_path / "awq") == "gptq"


# ---- bad input ----


def test_what_is_read_is_not_replaced(quantized, tmp_path):
    """--force replaces checkpoints and what conversions made, but not the source, which is read until the end."""
    source = Path(shutil.copytree(quantized("int4-g32"), tmp_path / "there" / "source"))
    shutil.copy(source / "config.json", tmp_path / "there")  # so that the folder may be replaced
    before = {file: file.read_bytes() for file in source.iterdir()}
    for target in (source, tmp_path / "there", source / ".." / "source"):
        with pytest.raises(CheckpointError, match=r"is or contains .*, which is read; choose another output"):
            convert_checkpoint(source, target, to="gptq", force=True)
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert convert_checkpoint(source, source / "within", to="gptq").exact


@pytest.fixture
def gptq(quantized, tmp_path) -> Path:
    convert_checkpoint(quantized("int4-g32"), tmp_path / "gptq", to="gptq")
    return tmp_path / "gptq"


def refused(path: Path, *words: str) -> None:
    """`load` ends in one sentence."""
    with pytest.raises(CheckpointError) as caught:
        bitfold.load(path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def set_section(path: Path, **fields: object) -> None:
    (path / "quantize_config.json").unlink(missing_ok=True)
    tiny.rewrite_config(path, quantization_config={**section(path), **fields})


def test_tensors_that_are_missing_or_of_another_method(gptq, tmp_path):
    whole = Path(shutil.copytree(gptq, tmp_path / "whole"))
    tiny.rewrite(gptq, lambda tensors: tensors.pop(f"{UP}.qzeros"))
    refused(gptq, UP, "lacks qzeros")
    shutil.copytree(whole, gptq, dirs_exist_ok=True)
    tiny.rewrite(gptq, lambda tensors: tensors.pop(f"{UP}.qweight"))
    refused(gptq, UP, "without a qweight")
    shutil.copytree(whole, gptq, dirs_exist_ok=True)
    tiny.rewrite(
        gptq,
        lambda tensors: [tensors.pop(f"{UP}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")],
    )
    refused(gptq, f"lacks 1 tensor ('{UP}.weight')")
    shutil.copytree(whole, gptq, dirs_exist_ok=True)
    tiny.rewrite(
        gptq, lambda tensors: tensors.update({f"{UP}.weight_packed": tensors[f"{UP}.qzeros"].clone()})
    )
    refused(gptq, "GPTQ", "weight_packed", "compressed-tensors")
    shutil.copytree(whole, gptq, dirs_exist_ok=True)
    tiny.rewrite(
        gptq, lambda tensors: tensors.update({"model.layers.7.a.qweight": tensors[f"{UP}.qweight"].clone()})
    )
    refused(gptq, "model.layers.7.a", "lacks")
    shutil.copytree(whole, gptq, dirs_exist_ok=True)
    tiny.rewrite(gptq, lambda tensors: tensors.update({f"{UP}.qweight": tensors[f"{UP}.qweight"][:6]}))
    refused(gptq, UP)


def test_configurations_that_contradict(gptq, quantized, tmp_path):
    """Mislabelled: other bits, other groups, another method, another version, two files that differ."""
    sound = section(gptq)
    tiny.rewrite_config(gptq, quantization_config={**sound, "bits": 8})
    refused(gptq, "quantize_config.json", "bits 4", "says 8")
    set_section(gptq, bits=8)
    refused(gptq, "down_proj", "scales is torch.float16 [4, 64]", "[2, 64]")
    set_section(gptq, bits=5)
    refused(gptq, "quantization_config.bits is 5", "2 or 3 or 4 or 8")
    set_section(gptq, bits=4, group_size=64)
    refused(gptq, "scales is torch.float16")
    set_section(gptq, group_size=0)
    refused(gptq, "group_size is 0")
    set_section(gptq, group_size=32, checkpoint_format="gptq_v2")
    refused(gptq, "zero points", "those of version 1", "--repair")
    set_section(gptq, checkpoint_format="marlin")
    refused(gptq, "'marlin'", "gptq and gptq_v2")
    set_section(gptq, checkpoint_format="gptq", quant_method="awq", version="gemm", zero_point=True)
    refused(gptq, "AWQ's", "packed as GPTQ's")
    set_section(gptq, quant_method="bitsandbytes", load_in_4bit=True)
    refused(gptq, "is faulty", "(2 more)", "bitfold check")
    set_section(gptq, quant_method="hqq")
    refused(gptq, "'hqq'")
    set_section(gptq, quant_method="gptq", dynamic={r"-:.*up_proj": {}})
    refused(gptq, UP, "says that it isn't")


def test_configurations_of_others(quantized, tmp_path):
    convert_checkpoint(quantized("int4-g32"), tmp_path / "ct", to="compressed-tensors")
    groups = section(tmp_path / "ct")["config_groups"]
    for change, words in (
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"R1": {}}}, "transform_config"),
        ({"quantization_status": "frozen"}, "quantization_status"),
        ({"config_groups": {}}, "config_groups is empty"),
        ({"format": "marlin-24", "config_groups": without_format(groups)}, "pack-quantized or"),
    ):
        path = Path(shutil.copytree(tmp_path / "ct", tmp_path / words.replace(" ", "-")))
        set_section(path, **change)
        refused(path, words)
    convert_checkpoint(quantized("nf4-b64"), tmp_path / "bnb", to="bitsandbytes")
    set_section(tmp_path / "bnb", load_in_8bit=True)
    refused(tmp_path / "bnb", "load_in_4bit is True")
    convert_checkpoint(quantized("int4-g32"), tmp_path / "awq", to="awq")
    set_section(tmp_path / "awq", version="gemv")
    refused(tmp_path / "awq", "version is 'gemv'", "gemm")


def without_format(groups: dict) -> dict:
    return {
        name: {key: value for key, value in group.items() if key != "format"}
        for name, group in groups.items()
    }


def test_shapes_that_no_one_packs(tmp_path):
    """n and k must fill whole words where the owner packs along them."""
    source = tiny.write_llama(tmp_path / "model", torch.float16, layers=1, ffn=100)
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int4-g32")
    with pytest.raises(CheckpointError, match="GPTQ packs 8"):
        convert_checkpoint(tmp_path / "q", tmp_path / "a", to="gptq")
    with pytest.raises(CheckpointError, match="AWQ packs 8"):
        convert_checkpoint(tmp_path / "q", tmp_path / "a", to="awq")
    assert convert_checkpoint(tmp_path / "q", tmp_path / "a", to="compressed-tensors").exact
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "q"))
    bitfold.quantize_checkpoint(source, tmp_path / "nf4", "nf4-b64")
    with pytest.raises(CheckpointError, match="blocks run across the rows"):
        convert_checkpoint(tmp_path / "nf4", tmp_path / "b", to="bitsandbytes")
    assert not convert_checkpoint(tmp_path / "nf4", tmp_path / "b", to="bitsandbytes", allow_lossy=True).exact
    assert bitfold.load(tmp_path / "b").model.layers[0].mlp.down_proj.layout == "flat"


def test_kinds_that_do_not_go_together(model, tmp_path):
    with pytest.raises(ValueError, match="quantize it first"):
        convert_checkpoint(model, tmp_path / "a", to="awq")
    with pytest.raises(ValueError, match="it must be one of gguf, gptq"):
        convert_checkpoint(model, tmp_path / "a", to="exl2")
    with pytest.raises(ValueError, match=r"end in \.gguf"):
        convert_checkpoint(model, tmp_path / "a.gguf", to="awq")
    assert set(OWNERS) == {target.owner for target in TARGETS.values()}


# ---- activations ----


def activations_of(path: Path) -> set[str]:
    layers = (m for m in bitfold.load(path).modules() if isinstance(m, bitfold.QuantLinear))
    return {str(layer.activations) for layer in layers}


@pytest.mark.parametrize(
    ("recipe", "threshold", "loaded"),
    [
        ("llm-int8", 6.0, "llm-int8"),
        ("llm-int8-t4.5", 4.5, "llm-int8-t4.5"),
        ("w8a8", 0.0, "int8"),
        ("int8-channel", 6.0, "llm-int8"),
        ("llm-int8-rows", 6.0, "llm-int8"),
    ],
)
def test_a_threshold_goes_along(recipe, threshold, loaded, model, tmp_path):
    bitfold.quantize_checkpoint(model, tmp_path / "q", recipe)
    there = convert_checkpoint(tmp_path / "q", tmp_path / "bnb", to="bitsandbytes", allow_lossy=True)
    assert section(tmp_path / "bnb")["llm_int8_threshold"] == threshold
    assert activations_of(tmp_path / "bnb") == {loaded}
    back = convert_checkpoint(tmp_path / "bnb", tmp_path / "back", to="bitfold", allow_lossy=True)
    assert activations_of(tmp_path / "back") == {loaded}
    (before,) = activations_of(tmp_path / "q")
    said = [f"the activations were '{before}', and in the new directory they are '{loaded}'"]
    assert [remark.split(": ")[1] for remark in there.remarks if "activations" in remark] == (
        said if before != loaded else []
    )
    assert not any("activations" in remark for remark in back.remarks)
    convert_checkpoint(tmp_path / "back", tmp_path / "again", to="bitsandbytes", allow_lossy=True)
    assert section(tmp_path / "again") == section(tmp_path / "bnb")


@pytest.mark.parametrize(
    ("threshold", "loaded"),
    [
        (0, "int8"),
        (0.0, "int8"),
        (None, "int8"),
        (5, "llm-int8-t5"),
        (6.0, "llm-int8"),
        ("absent", "llm-int8"),
    ],
)
def test_thresholds_that_configurations_have(threshold, loaded, quantized, tmp_path):
    convert_checkpoint(quantized("int8-channel"), tmp_path / "bnb", to="bitsandbytes")
    if threshold == "absent":
        config = json.loads((tmp_path / "bnb" / "config.json").read_text())
        del config["quantization_config"]["llm_int8_threshold"]
        (tmp_path / "bnb" / "config.json").write_text(json.dumps(config))
    else:
        set_section(tmp_path / "bnb", llm_int8_threshold=threshold)
    assert activations_of(tmp_path / "bnb") == {loaded}


@pytest.mark.parametrize("threshold", [-1.0, "6", True, float("nan"), float("inf")])
def test_thresholds_that_are_none(threshold, quantized, tmp_path):
    convert_checkpoint(quantized("int8-channel"), tmp_path / "bnb", to="bitsandbytes")
    set_section(tmp_path / "bnb", llm_int8_threshold=threshold)
    with pytest.raises(
        CheckpointError, match=r"llm_int8_threshold is .*; it must be a number that is at least 0"
    ):
        bitfold.load(tmp_path / "bnb")


def test_what_calibration_found_stays_behind_and_is_told(model, tmp_path):
    """A static step and 16-bit copies have no place in bitsandbytes' files, nor has any of it in a GGUF file."""
    from bitfold import quantize_calibrated

    text = tmp_path / "text.txt"
    text.write_text("some words of a text to calibrate on " * 30)
    options = {"samples": 2, "sequence_length": 32}
    for recipe, there in (("llm-int8-t0.5", "llm-int8-t0.5"), ("w8a8-static", "llm-int8")):
        source = tmp_path / recipe
        quantize_calibrated(model, source, recipe, text, **options)
        (before,) = activations_of(source)
        assert before in ("llm-int8-t0.5-exact", "int8-static")
        if before.endswith("exact"):
            with pytest.raises(
                CheckpointError, match=r"has copies of [24] columns in 16 bits; --allow-lossy"
            ):
                convert_checkpoint(source, tmp_path / "ct", to="compressed-tensors")
        done = convert_checkpoint(source, tmp_path / f"{recipe}-bnb", to="bitsandbytes", allow_lossy=True)
        assert any(f"were '{before}'" in remark for remark in done.remarks)
        assert activations_of(tmp_path / f"{recipe}-bnb") == {there}
        told: list[str] = []
        target = tmp_path / f"{recipe}-blocks"
        convert_directory(open_source(source), target, "gguf", allow_lossy=True, remark=told.append)
        assert any(f"were '{before}', and in the new directory they are 'float'" in text for text in told)
        assert activations_of(target) == {"float"}
        done = convert_checkpoint(source, tmp_path / f"{recipe}-plain", decode=torch.float32)
        assert done.exact
        assert any(
            f"were '{before}', and in the new directory they are 'float'" in text for text in done.remarks
        )
        decoded = tiny.tensors_of(tmp_path / f"{recipe}-plain")
        for name, layer in bitfold.load(source).named_modules():
            if isinstance(layer, bitfold.QuantLinear):
                assert torch.equal(decoded[f"{name}.weight"], layer.decode()), name


GROUPS = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": True,
}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "fp8",
            "transformers (fine-grained fp8) rounds their inputs to 8-bit floats with a scale for each 128 of a row",
        ),
        (
            "compressed-tensors",
            'compressed-tensors rounds their inputs (type "float", num_bits 8, symmetric true, ',
        ),
    ],
)
def test_scales_that_no_tensor_tells_of(target, said, quantized, tmp_path, capsys):
    """Inputs that the owner rounds as the model runs, 128 by 128, stay floats: convert tells and stores it, load warns;
    and a directory that asks for nothing of the kind is told nothing of."""
    path = tmp_path / "there"
    convert_checkpoint(quantized("fp8-block"), path, to=target)
    if target == "compressed-tensors":
        assert not convert_checkpoint(path, tmp_path / "before").remarks
        groups = section(path)["config_groups"]
        groups["group_0"]["input_activations"] = GROUPS
        set_section(path, config_groups=groups)
    whole = f"7 layers ('model.layers.0.mlp.down_proj', ...): {said}"
    with pytest.warns(UserWarning, match="they stay floats") as warned:
        model = bitfold.load(path)
    assert [str(one.message).startswith(f"{path}: {whole}") for one in warned] == [True]
    assert warned[0].filename == __file__
    assert {
        str(layer.activations) for layer in model.modules() if isinstance(layer, bitfold.QuantLinear)
    } == {"float"}

    code, out, err = call(capsys, "convert", path, tmp_path / "back")
    assert code == 0, err
    stored = json.loads((tmp_path / "back" / "bitfold_conversion.json").read_text())
    assert len(stored["remarks"]) == 1
    assert stored["remarks"][0].startswith(whole)
    assert stored["remarks"][0].endswith(", and bitfold doesn't: they stay floats")
    assert "".join(stored["remarks"][0].split()) in "".join(out.split())  # wrapped
    assert activations_of(tmp_path / "back") == {"float"}


def test_who_rounds_inputs_is_told_of_what_is_made(quantized, tmp_path):
    (remark,) = convert_checkpoint(quantized("fp8-block"), tmp_path / "there", to="fp8").remarks
    assert remark.startswith(
        "transformers rounds their inputs to 8-bit floats with a scale for each 128 of a row"
    )
