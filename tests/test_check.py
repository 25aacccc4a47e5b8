"""`bitfold check`: every planted fault is found and named, sound checkpoints pass, repairs give the sound one's
weights.
"""

from __future__ import annotations

import json
import shutil

import bitfold
import numpy as np
import planted
import pytest
import tiny
import torch
from bitfold.check.examine import examine
from bitfold.check.repair import repair
from bitfold.foreign.owners import read_owner
from bitfold.rules import Recipe, Rule
from bitfold.shards import CheckpointError
from command import call
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401

NAME = planted.NAMES[0]


def kinds(report) -> set[str]:
    return {problem.kind for problem in report.problems}


def decoded(path) -> dict[str, torch.Tensor]:
    """The weights of a foreign directory, as its own configuration says."""
    owner, settings = read_owner(path)
    stored = load_file(path / "model.safetensors")
    found = {}
    for name, parts in owner.modules(stored).items():
        scheme = settings.scheme(name)
        found[name] = scheme.unpack({part: stored[f"{name}.{part}"] for part in parts}).decode()
    return found


def same_weights(one, two) -> None:
    first, second = decoded(one), decoded(two)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(second[name], weight), name


# ---- sound ones ----


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sound_gptq(bits, symmetric, version, tmp_path):
    path = planted.gptq_directory(tmp_path / "m", bits=bits, symmetric=symmetric, version=version)
    report = examine(path)
    assert report.sound, report.problems
    assert report.modules == len(planted.NAMES)
    assert report.owner == "gptq"


@pytest.mark.parametrize("symmetric", [True, False])
def test_sound_awq(symmetric, tmp_path):
    assert examine(planted.awq_directory(tmp_path / "m", symmetric=symmetric)).sound


# ---- zero points ----


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_that_the_label_gets_wrong(bits, symmetric, version, tmp_path):
    """A file of one version that says it is the other is found by its tensors and repaired by its label."""
    if bits == 8 and not symmetric:
        pytest.skip("a step of 8 bits is too small to tell: the next test")
    sound = planted.gptq_directory(tmp_path / "sound", bits=bits, symmetric=symmetric, version=version)
    path = shutil.copytree(sound, tmp_path / "wrong")
    planted.relabel(path, checkpoint_format="gptq" if version == 2 else "gptq_v2")
    report = examine(path)
    assert [problem.kind for problem in report.problems] == ["zeros-off-by-one"], report.problems
    assert report.problems[0].where == str(path / "config.json")
    assert f"version {3 - version}" in report.problems[0].found
    result = repair(path, tmp_path / "right")
    assert result.after.sound
    assert len(result.done) == 1
    same_weights(tmp_path / "right", sound)


def test_8_bits_are_undecided_and_not_refused(tmp_path):
    path = planted.gptq_directory(tmp_path / "m", bits=8, shift=0.05)
    planted.relabel(path, checkpoint_format="gptq_v2")
    report = examine(path)
    assert report.sound
    assert "undecided" in report.doubts[0].text


@pytest.mark.parametrize("move", [1, -1])
def test_modules_whose_zero_points_alone_are_wrong(move, tmp_path):
    """Two of eight modules: each is named, and its zero points are written anew."""
    sound = planted.gptq_directory(tmp_path / "sound", version=2, group=32, shape=(256, 512))
    path = shutil.copytree(sound, tmp_path / "wrong")
    wrong = planted.NAMES[1:3]

    def edit(tensors):
        for name in wrong:
            tensors[f"{name}.qzeros"] += move * 0x11111111

    planted.change(path, edit)
    report = examine(path)
    assert kinds(report) == {"zeros-off-by-one"}
    assert [problem.where for problem in report.problems] == sorted(f"{name}.qzeros" for name in wrong)
    assert ("too large" if move == 1 else "too small") in report.problems[0].found
    assert repair(path, tmp_path / "right").after.sound
    same_weights(tmp_path / "right", sound)


@pytest.mark.parametrize("move", [1, -1])
def test_awq_off_by_one(move, tmp_path):
    sound = planted.awq_directory(tmp_path / "sound")
    path = planted.awq_directory(tmp_path / "wrong", move=move)
    assert kinds(examine(path)) == {"zeros-off-by-one"}
    assert repair(path, tmp_path / "right").after.sound
    same_weights(tmp_path / "right", sound)


@pytest.mark.parametrize("version", [1, 2])
def test_dead_columns_tell(version, tmp_path):
    """Weights that are exactly 0 lie at the zero point, whatever the others do: 8 bits too."""
    path = planted.gptq_directory(tmp_path / "m", bits=8, version=version, dead=8, shift=0.3)
    assert examine(path).sound
    planted.relabel(path, checkpoint_format="gptq" if version == 2 else "gptq_v2")
    assert kinds(examine(path)) == {"zeros-off-by-one"}


def test_a_mean_of_one_step_is_no_fault(tmp_path):
    """The weights' own mean is a step from 0, as if zero points were off by one: the groups' steps tell that it
    isn't.
    """
    for shift in (0.35, -0.35):
        path = planted.gptq_directory(
            tmp_path / f"m{shift}", group=128, kind="normal", shift=shift, shape=(256, 1024)
        )
        report = examine(path)
        assert report.sound, report.problems
        assert report.doubts


def test_symmetric_label_of_other_zero_points(tmp_path):
    sound = planted.gptq_directory(tmp_path / "sound")
    path = shutil.copytree(sound, tmp_path / "wrong")
    planted.relabel(path, sym=True)
    assert kinds(examine(path)) == {"symmetry"}
    assert repair(path, tmp_path / "right").after.sound
    same_weights(tmp_path / "right", sound)


# ---- orders and borrows ----

NATURAL = tuple(range(8))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    ("order", "zero_order"), [(NATURAL, None), (planted.AWQ_ORDER, NATURAL), (NATURAL, planted.AWQ_ORDER)]
)
def test_awq_packed_in_another_order(order, zero_order, group, tmp_path):
    sound = planted.awq_directory(tmp_path / "sound", group=group)
    path = planted.awq_directory(tmp_path / "wrong", group=group, order=order, zero_order=zero_order)
    report = examine(path)
    assert kinds(report) == {"nibble-order"}
    assert len(report.problems) == len(planted.NAMES)
    assert repair(path, tmp_path / "right").after.sound
    same_weights(tmp_path / "right", sound)


def many_zeros() -> dict[str, tuple]:
    """Matrices in which about one zero point in twelve is 0: rows whose weights are all positive."""
    found = {}
    for seed, name in enumerate(planted.NAMES):
        w = planted.weights(128, 512, seed)
        w[np.random.default_rng(seed).random(128) < 1 / 12] *= np.sign(w[0, 0])
        rows = np.random.default_rng(seed + 100).random(128) < 1 / 12
        w[rows] = np.abs(w[rows])
        found[name] = planted.rounded(w, 4, 32)
    return found


def test_zero_points_packed_one_by_one(tmp_path):
    """0 - 1 was taken within each number, and the reader's whole-word sum carries into the next."""
    numbers = many_zeros()
    sound = planted.write(
        tmp_path / "sound",
        {name: planted.gptq(*parts, 4, 1, 32) for name, parts in numbers.items()},
        planted.gptq_config(4, 32, False, 1),
    )
    assert examine(sound).sound
    wrong = {}
    for name, (codes, zeros, scales) in numbers.items():
        wrong[name] = planted.gptq(codes, (zeros - 1) % 16, scales, 4, 2, 32)
    path = planted.write(tmp_path / "wrong", wrong, planted.gptq_config(4, 32, False, 1))
    assert kinds(examine(path)) == {"zeros-borrow"}
    assert repair(path, tmp_path / "right").after.sound
    same_weights(tmp_path / "right", sound)


def test_zero_points_overwritten(tmp_path):
    """0 - 1 as 32 ones, written over the rest of the word: nothing can bring back what was there."""
    wrong = {}
    for name, (codes, zeros, scales) in many_zeros().items():
        stored = zeros - 1
        for row in range(len(stored)):
            for group in range(stored.shape[1]):
                if row % 8 and stored[row - 1, group] in (-1, 15):
                    stored[row, group] = 15
        wrong[name] = planted.gptq(codes, stored % 16, scales, 4, 2, 32)
    path = planted.write(tmp_path / "m", wrong, planted.gptq_config(4, 32, False, 1))
    report = examine(path)
    assert kinds(report) == {"zeros-overwritten"}
    with pytest.raises(CheckpointError, match="none of which has a sure repair"):
        repair(path, tmp_path / "out")


# ---- values ----


@pytest.mark.parametrize(
    ("value", "kind", "word"),
    [
        (float("nan"), "scale-not-finite", "nan"),
        (float("inf"), "scale-not-finite", "inf"),
        (-0.01, "scale-negative", "negative"),
        (0.0, "scale-zero", "are 0"),
    ],
)
@pytest.mark.parametrize("owner", ["gptq", "awq"])
def test_scales(owner, value, kind, word, tmp_path):
    path = planted.awq_directory(tmp_path / "m") if owner == "awq" else planted.gptq_directory(tmp_path / "m")
    planted.change(path, lambda tensors: tensors[f"{NAME}.scales"][3].__setitem__(5, value))
    report = examine(path)
    assert kinds(report) == {kind}
    assert report.problems[0].where == f"{NAME}.scales"
    assert word in report.problems[0].found


def test_a_zero_scale_of_a_group_of_zeros_is_sound(tmp_path):
    path = planted.gptq_directory(tmp_path / "m", symmetric=True, version=2)

    def edit(tensors):
        tensors[f"{NAME}.scales"][0, 0] = 0
        tensors[f"{NAME}.qweight"][:4, 0] = torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)

    planted.change(path, edit)
    assert examine(path).sound


def test_weights_that_are_no_numbers(tmp_path):
    path = planted.gptq_directory(tmp_path / "m")
    planted.change(path, lambda tensors: tensors["model.norm.weight"].__setitem__(7, float("inf")))
    (problem,) = examine(path).problems
    assert (problem.kind, problem.where) == ("weight-not-finite", "model.norm.weight")
    assert "[7]" in problem.found


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda g_idx: g_idx.__setitem__(3, 16), "g_idx-range"),
        (lambda g_idx: g_idx.__setitem__(3, -1), "g_idx-range"),
        (lambda g_idx: g_idx.__setitem__(3, 1), "g_idx-groups"),
    ],
)
def test_g_idx(edit, kind, tmp_path):
    path = planted.gptq_directory(tmp_path / "m")
    planted.change(path, lambda tensors: edit(tensors[f"{NAME}.g_idx"]))
    (problem,) = examine(path).problems
    assert (problem.kind, problem.where) == (kind, f"{NAME}.g_idx")


def test_desc_act_that_the_label_denies(tmp_path):
    path = planted.gptq_directory(tmp_path / "m")
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))

    def edit(tensors):
        codes = planted.rounded(planted.weights(96, 512, 0), 4, 32)[0][:, order.numpy()]
        tensors[f"{NAME}.qweight"] = torch.from_numpy(planted.streams(codes, 4).T.copy().view(np.int32))
        tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"][order]

    planted.change(path, edit)
    (problem,) = examine(path).problems
    assert problem.kind == "desc_act"
    result = repair(path, tmp_path / "right")
    assert result.after.sound
    section = json.loads((tmp_path / "right" / "config.json").read_text())["quantization_config"]
    assert section["desc_act"] is True


# ---- shapes, files, owners ----


def test_shapes(tmp_path):
    sound = planted.gptq_directory(tmp_path / "sound")
    cuts = {
        "scales": lambda t: t[:-1],
        "qzeros": lambda t: t[:, :-1],
        "qweight": lambda t: t[:-1],
        "g_idx": lambda t: t[:-1],
    }
    for part, cut in cuts.items():
        path = shutil.copytree(sound, tmp_path / part)
        planted.change(
            path,
            lambda tensors, cut=cut, part=part: tensors.update(
                {f"{NAME}.{part}": cut(tensors[f"{NAME}.{part}"]).contiguous()}
            ),
        )
        (problem,) = examine(path).problems
        assert problem.kind in ("shape", "g_idx-groups")
        assert problem.where.startswith(NAME)


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [-96, 512], [96, 513], [0, 0], [97, 512]])
def test_packed_shapes_that_overflow(shape, tmp_path):
    codes, _, scales = planted.rounded(planted.weights(96, 512, 0), 4, 32, symmetric=True)
    parts = {
        "weight_packed": torch.from_numpy(planted.streams(codes, 4).view(np.int32)),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([96, 512]),
    }
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    path = planted.write(tmp_path / "m", {NAME: parts}, section)
    assert examine(path).sound
    planted.change(path, lambda tensors: tensors.update({f"{NAME}.weight_shape": torch.tensor(shape)}))
    (problem,) = examine(path).problems
    assert problem.kind == "shape"
    assert "weight_shape" in problem.found


def test_tensors_of_two_methods(tmp_path):
    sound = planted.gptq_directory(tmp_path / "sound")
    path = shutil.copytree(sound, tmp_path / "other")
    planted.change(
        path, lambda tensors: tensors.update({"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32)})
    )
    assert kinds(examine(path)) == {"two-methods"}
    path = shutil.copytree(sound, tmp_path / "plain")
    planted.change(path, lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(96, 512)}))
    assert kinds(examine(path)) == {"two-methods"}


def test_the_other_owners_label(tmp_path):
    path = planted.gptq_directory(tmp_path / "m")
    planted.relabel(path, **planted.awq_config(32))
    (problem,) = examine(path).problems
    assert problem.kind == "owner"
    path = planted.awq_directory(tmp_path / "n")
    planted.relabel(path, **planted.gptq_config(4, 32, False, 1))
    (problem,) = examine(path).problems
    assert problem.kind == "owner"


def test_missing_tensors(tmp_path):
    sound = planted.gptq_directory(tmp_path / "sound")
    for part in ("qweight", "qzeros", "scales"):
        path = shutil.copytree(sound, tmp_path / part)
        planted.change(path, lambda tensors, part=part: tensors.pop(f"{NAME}.{part}"))
        found = kinds(examine(path))
        assert found <= {"tensor-missing", "shape"}
        assert found


def sharded(path):
    """Two shards and an index, of a sound directory."""
    planted.gptq_directory(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    table = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        table |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return path, table


def test_shards_against_the_index(tmp_path):
    path, table = sharded(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    assert examine(path).sound
    first, second = sorted(set(table.values()))

    tensors = load_file(path / second)
    name = next(iter(load_file(path / first)))
    save_file({**tensors, name: load_file(path / first)[name]}, path / second)
    (problem,) = examine(path).problems
    assert (problem.kind, problem.where) == ("tensor-twice", name)
    assert "same bytes" in problem.found
    assert repair(path, tmp_path / "once").after.sound
    save_file({**tensors, name: load_file(path / first)[name] * 2 + 1}, path / second)
    (problem,) = examine(path).problems
    assert "different values" in problem.found
    assert not problem.repair
    save_file(tensors, path / second)

    moved = {**table, "model.norm.weight": first if table["model.norm.weight"] == second else second}
    index.write_text(json.dumps({"weight_map": moved}))
    (problem,) = examine(path).problems
    assert (problem.kind, problem.where) == ("index", "model.norm.weight")
    assert repair(path, tmp_path / "moved").after.sound
    index.write_text(json.dumps({"weight_map": {**table, "lost.weight": first}}))
    assert kinds(examine(path)) == {"tensor-missing"}
    index.write_text(json.dumps({"weight_map": {k: v for k, v in table.items() if k != "model.norm.weight"}}))
    assert kinds(examine(path)) == {"index"}
    index.write_text(json.dumps({"weight_map": table}))

    raw = (path / second).read_bytes()
    (path / second).write_bytes(raw[:-100])
    assert "file-damaged" in kinds(examine(path))
    (path / second).unlink()
    report = examine(path)
    assert "file-missing" in kinds(report)
    with pytest.raises(CheckpointError, match=r"can't be repaired|sure repair"):
        repair(path, tmp_path / "out")


def test_nothing_to_repair(tmp_path):
    path = planted.gptq_directory(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no fault"):
        repair(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        examine(tmp_path / "nowhere")


# ---- the command ----


def test_command(tmp_path, capsys):
    path = planted.gptq_directory(tmp_path / "m")
    code, out, _ = call(capsys, "check", path)
    assert code == 0
    assert "no fault found" in out
    planted.relabel(path, checkpoint_format="gptq_v2")
    code, out, _ = call(capsys, "check", path)
    assert code == 1
    assert "[zeros-off-by-one]" in out
    code, out, _ = call(capsys, "check", path, "--json")
    assert code == 1
    data = json.loads(out)
    assert data["sound"] is False
    assert data["problems"][0]["kind"] == "zeros-off-by-one"
    code, out, _ = call(capsys, "check", path, "--repair", tmp_path / "right")
    assert code == 0
    assert "1 faults repaired" in out or "1 fault repaired" in out
    code, _, err = call(capsys, "check", path, "--repair", tmp_path / "right")
    assert code == 2
    assert "exists" in err


# ---- loading ----


def quantized_llama(path, **labels):
    """A tiny Llama whose linear layers are GPTQ's, symmetric, version 1."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.config(tied=True))
    section = planted.gptq_config(4, 32, True, 1)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            parts = planted.gptq(*planted.rounded(tensor.numpy(), 4, 32, True), 4, 1, 32)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        elif name != "lm_head.weight":
            tensors[name] = tensor
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads(model.config.to_json_string()), "quantization_config": {**section, **labels}}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def test_load_refuses_what_check_finds(tmp_path):
    sound = quantized_llama(tmp_path / "sound")
    assert examine(sound).sound
    model = bitfold.load(sound)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    wrong = quantized_llama(tmp_path / "wrong", checkpoint_format="gptq_v2")
    with pytest.raises(CheckpointError, match=r"is faulty.*version 1.*bitfold check .*--repair"):
        bitfold.load(wrong)
    repair(wrong, tmp_path / "right")
    again = bitfold.load(tmp_path / "right")
    assert torch.equal(again(torch.arange(8)[None]).logits, model(torch.arange(8)[None]).logits)


def test_names_and_shapes_against_the_model(tmp_path):
    path = quantized_llama(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    for change, where in [({"intermediate_size": 256}, "mlp.up_proj"), ({"vocab_size": 300}, "embed_tokens")]:
        (path / "config.json").write_text(json.dumps({**config, **change}))
        found = [problem for problem in examine(path).problems if problem.kind == "model"]
        assert any(where in problem.where for problem in found), change
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert kinds(examine(path)) == {"model"}
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert kinds(examine(path)) == {"tensor-missing"}


# ---- bitfold's own, GGUF ----


def test_own_checkpoints(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(512, 128, bias=False), torch.nn.Linear(128, 64))
    for module, seed in zip(model, (1, 2), strict=True):
        shape = (module.out_features, module.in_features)
        module.weight.data = torch.from_numpy(planted.weights(*shape, seed))
    bitfold.quantize(model, "int4-g32-asym")
    bitfold.save(model, tmp_path / "sound")
    assert examine(tmp_path / "sound").sound
    faults = {
        "scale-not-finite": lambda tensors: tensors["0.scales"][3].__setitem__(2, float("nan")),
        "scale-zero": lambda tensors: tensors["0.scales"][3].__setitem__(2, 0),
        "scale-negative": lambda tensors: tensors["0.scales"][3].__setitem__(2, -1),
        "tensor-missing": lambda tensors: tensors.pop("1.zeros"),
        "shape": lambda tensors: tensors.update({"1.zeros": tensors["1.zeros"][1:].clone()}),
        "weight-not-finite": lambda tensors: tensors["1.bias"].__setitem__(2, float("nan")),
    }
    for kind, edit in faults.items():
        path = shutil.copytree(tmp_path / "sound", tmp_path / kind)
        planted.change(path, edit)
        assert kinds(examine(path)) == {kind}


def test_weights_that_two_modules_share(tmp_path):
    """They are stored once, under the name of the first, and looked at once."""
    tiny.write_llama(tmp_path / "model", tied=True)
    rules = tuple(Rule(pattern, "int4-g32-asym") for pattern in ("*.embed_tokens", "lm_head", "*"))
    bitfold.quantize_checkpoint(tmp_path / "model", tmp_path / "sound", Recipe("all", "", rules))
    report = examine(tmp_path / "sound")
    assert report.sound
    assert report.modules == 16
    scales = "model.embed_tokens.scales"
    edits = {
        "scale-not-finite": (lambda tensors: tensors[scales][3].__setitem__(1, float("nan")), [scales]),
        "tensor-missing": (lambda tensors: tensors.pop(scales), [scales, "lm_head.scales"]),
    }
    for kind, (edit, names) in edits.items():
        path = shutil.copytree(tmp_path / "sound", tmp_path / kind)
        planted.change(path, edit)
        faults = [problem for problem in examine(path).problems if problem.kind == kind]
        assert [problem.where for problem in faults] == names
    assert "is model.embed_tokens.scales, which is in no file" in str(faults[1])


def test_gguf_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for value, sound in ((None, True), (np.inf, False)):
        path = tmp_path / f"{sound}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
        if value is not None:
            blocks[3, :2] = np.array([value], np.float16).view(np.uint8)
        writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        report = examine(path)
        assert report.sound == sound
        assert report.owner == "gguf"
    assert report.problems[0].where == "blk.0.ffn_up.weight"
    assert "row 3" in report.problems[0].found
    raw = path.read_bytes()
    path.write_bytes(raw[:-100])
    assert kinds(examine(path)) == {"file-damaged"}
