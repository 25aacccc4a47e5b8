"""What calibration finds for activations: steps, usual outlier columns, SmoothQuant's scales; against plain loops over
the whole model, and numpy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import bitfold
import calibrated
import mixtures
import numpy as np
import oracle_fp8
import pytest
import tiny
import tiny_architectures
import torch
from bitfold import hf, quantize_calibrated
from bitfold.activations import Activations
from bitfold.calibration import data, ranges, smoothing
from bitfold.calibration.ranges import Ranges
from bitfold.calibration.workers import Workers
from bitfold.nn import QuantLinear
from bitfold.quantizers.transforms import SmoothOptions
from bitfold.recipes import Recipe, Rule
from bitfold.shards import CheckpointError
from calibrated import (
    BUNDLES,
    OPTIONS,
    block_run,
    contents,
    outputs,
    prepared,
    quantize_by_two_processes,
    quantize_with_kills,
)
from command import call, call_json
from tiny import one_thread  # noqa: F401

PLANTED = {3: 24.0, 40: 40.0}  # hidden channels, and how much larger norms make them
IDS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
RECIPES = ("llm-int8", "w8a8-static", "smoothquant-w8a8-static")
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(tensors: dict[str, torch.Tensor]) -> None:
    """Norms make some channels larger, and what they feed has weights as many times smaller: the same function."""
    for layer in range(3):
        for norm, targets in NORMS.items():
            for channel, factor in PLANTED.items():
                tensors[f"model.layers.{layer}.{norm}.weight"][channel] *= factor
                for target in targets:
                    tensors[f"model.layers.{layer}.{target}.weight"][:, channel] /= factor


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model with true outlier features."""
    path = calibrated.write_model(tmp_path_factory.mktemp("outliers") / "model")
    tiny.rewrite(path, plant)
    return path


@pytest.fixture(scope="module")
def ids(text) -> torch.Tensor:
    return data.read(text, tiny.tokenizer(), **OPTIONS).ids


@pytest.fixture(scope="module")
def made(source, text, tmp_path_factory):
    """Checkpoints by recipe, each by a run that nothing interrupts."""
    folder, found = tmp_path_factory.mktemp("made"), {}

    def make(recipe: str) -> Path:
        if recipe not in found:
            found[recipe] = folder / recipe
            quantize_calibrated(source, found[recipe], recipe, text, **OPTIONS)
        return found[recipe]

    return make


@torch.no_grad()
def inputs_of(model: torch.nn.Module, names: list[str], ids: torch.Tensor) -> dict[str, np.ndarray]:
    """What layers are called with, sample by sample: float64 [samples, tokens, k]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0][0])
        )
        for name in names
    ]
    for row in ids:
        model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(xs).double().numpy() for name, xs in seen.items()}


def layers_of(model: torch.nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


# ---- numbers ----


def usual(x: np.ndarray, threshold: float) -> list[int]:
    """Of inputs [samples, tokens, k]: the rule of docs/calibration.md, read from there."""
    reaching = np.abs(x).max(1) >= threshold
    columns = [c for c in range(x.shape[2]) if reaching[:, c].sum() / len(x) >= 0.25]
    energy = (x**2).sum((0, 1))
    most = max(1, x.shape[2] // 32)
    return sorted(sorted(columns, key=lambda c: (-energy[c], c))[:most])


def test_usual_columns_are_those_of_the_rule(rng):
    for samples, k, loud in [(8, 96, 2), (8, 96, 7), (5, 20, 3), (1, 64, 1), (12, 320, 0)]:
        x = rng.normal(size=(samples, 6, k))
        for channel in rng.choice(k, loud, replace=False):
            x[rng.random(samples) < 0.6, 2, channel] = rng.uniform(5, 9)
        rows = [ranges.of_sample(torch.from_numpy(sample)) for sample in x]
        found = Ranges(*(torch.stack(part) for part in zip(*rows, strict=True)))
        for threshold in (3.0, 6.0, 7.5):
            assert found.usual_outliers(threshold).tolist() == usual(x.astype(np.float32), threshold)
        assert found.usual_outliers(6.0).dtype == torch.int32
        assert found.step(127).item() == np.float32(np.float64(np.abs(x).astype(np.float32).max()) / 127)
    even = Ranges(torch.full((4, 64), 7.0), torch.ones(4, 64, dtype=torch.float64))
    assert even.usual_outliers(6.0).tolist() == [0, 1]  # of equal ones the first


def test_a_copy_has_the_16_bits_that_are_nearer():
    weight = torch.tensor([[1.0, 2.0**-20], [1 + 2.0**-10, 3.0]])
    assert torch.equal(ranges.in_16_bits(weight), weight.half())
    assert ranges.in_16_bits(weight * 1e6).dtype == torch.bfloat16  # fp16 has no such numbers
    for dtype in (torch.float16, torch.bfloat16):
        kept = ranges.in_16_bits(weight.to(dtype).t())
        assert kept.dtype == dtype
        assert kept.is_contiguous()


@pytest.mark.parametrize(
    ("recipe", "kind", "largest"),
    [("w8a8-static", "int8-static", 127), ("fp8-w8a8-static", "fp8-static", 448)],
)
def test_steps_are_those_of_the_finished_models_inputs(recipe, kind, largest, made, ids):
    """Every layer has been given what the layers before it, rounding their inputs too, make of the text."""
    model = bitfold.load(made(recipe), dtype=torch.float32)
    layers = layers_of(model)
    assert len(layers) == 21
    inputs = inputs_of(model, list(layers), ids)
    for name, layer in layers.items():
        assert str(layer.activations) == kind
        assert layer.x_scale.item() == pytest.approx(np.abs(inputs[name]).max() / largest, rel=1e-6), name
    report = json.loads((made(recipe) / "bitfold_report.json").read_text())
    for module in report["modules"]:
        assert module["calibration"]["method"] == "rtn"
        assert module["calibration"]["x_scale"] == layers[module["name"]].x_scale.item()
        assert module["calibration"]["outliers"] is None


@torch.no_grad()
def test_static_8_bit_floats_end_to_end(source, text, ids, tmp_path):
    """A text in, logits out: each step is the largest input of its layer / 448, each product that of the oracle with
    that step, and what was saved once more computes the same to the bit."""
    quantize_calibrated(source, tmp_path / "q", "fp8-w8a8-static", text, **OPTIONS)
    model = bitfold.load(tmp_path / "q", dtype=torch.float32)
    layers = layers_of(model)
    stored = tiny.tensors_of(tmp_path / "q")
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
        for name, layer in layers.items()
    ]
    largest = dict.fromkeys(layers, 0.0)
    for row in ids:
        model(input_ids=row[None], use_cache=False)
        for name, (x, _) in seen.items():
            largest[name] = max(largest[name], float(np.abs(x.numpy()).max()))
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        assert stored[f"{name}.x_scale"].dtype == torch.float32
        scale = stored[f"{name}.x_scale"].item()
        assert scale == pytest.approx(largest[name] / 448, rel=1e-6), name
        x, y = (tensor.double().flatten(0, -2).numpy() for tensor in seen[name])
        wanted = oracle_fp8.linear(x, layer.qtensor.decode().numpy(), x_scale=scale)
        assert np.linalg.norm(y - wanted) < 5e-6 * np.linalg.norm(wanted), name

    logits = model(input_ids=ids).logits
    bitfold.save(model, tmp_path / "again")
    again = bitfold.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(input_ids=ids).logits, logits)
    assert {str(layer.activations) for layer in layers_of(again).values()} == {"fp8-static"}
    for layer in layers_of(again).values():  # the scale is used: a hundredth of it saturates nearly all
        layer.x_scale.mul_(0.01)
    other = again(input_ids=ids).logits
    assert tiny_architectures.relative_difference(other.double(), logits.double()) > 0.1


def test_copies_are_those_of_the_usual_columns(source, made, ids):
    model, base = bitfold.load(made("llm-int8"), dtype=torch.float32), tiny.tensors_of(source)
    layers = layers_of(model)
    inputs = inputs_of(model, list(layers), ids)
    report = json.loads((made("llm-int8") / "bitfold_report.json").read_text())
    told = {module["name"]: module for module in report["modules"]}
    with_copies = 0
    for name, layer in layers.items():
        wanted = usual(inputs[name], 6.0)
        assert told[name]["calibration"]["outliers"] == len(wanted)
        assert told[name]["bytes_after"] == layer.nbytes
        if not wanted:
            assert str(layer.activations) == "llm-int8"
            assert layer.outlier_columns is None
            continue
        with_copies += 1
        assert str(layer.activations) == "llm-int8-exact"
        assert layer.outlier_columns.tolist() == wanted
        assert layer.outlier_weight.dtype == torch.bfloat16
        assert torch.equal(layer.outlier_weight, base[f"{name}.weight"][:, wanted])
        if name.endswith(("q_proj", "up_proj")):
            assert wanted == sorted(PLANTED)
    assert with_copies >= 15


def test_planes_are_those_of_plain_rounding(source, made, tmp_path):
    bitfold.quantize_checkpoint(source, tmp_path / "plain", "llm-int8")
    plain, found = tiny.tensors_of(tmp_path / "plain"), tiny.tensors_of(made("llm-int8"))
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    assert {name.rpartition(".")[2] for name in found.keys() - plain.keys()} == {
        "outlier_columns",
        "outlier_weight",
    }
    assert {str(layer.activations) for layer in layers_of(bitfold.load(tmp_path / "plain")).values()} == {
        "llm-int8"
    }


@torch.no_grad()
def test_each_of_them_makes_up_for_something(source, made, ids, tmp_path):
    base = hf.load_causal_lm(source, dtype=torch.float32)(input_ids=ids).logits

    def error(path: Path) -> float:
        model = bitfold.load(path, dtype=torch.float32)
        return tiny_architectures.relative_difference(model(input_ids=ids).logits.double(), base.double())

    for recipe in ("llm-int8", "w8a8"):
        bitfold.quantize_checkpoint(source, tmp_path / recipe, recipe)
    assert error(made("llm-int8")) < 0.5 * error(tmp_path / "llm-int8")
    assert error(tmp_path / "llm-int8") < error(tmp_path / "w8a8")
    assert error(made("smoothquant-w8a8-static")) < 0.5 * error(made("w8a8-static"))


# ---- SmoothQuant ----


@pytest.mark.parametrize(("name", "kept"), tiny_architectures.KEPT)
def test_a_smoothed_block_computes_what_it_did(name, kept, tmp_path):
    """Of a bfloat16 checkpoint, as it will be stored: with norms, biases and kept layers in bfloat16."""
    tiny_architectures.model(name, torch.bfloat16).save_pretrained(tmp_path)
    keep = (Rule(kept, "keep"),) if kept else ()
    recipe = Recipe("smooth", "", (*keep, Rule("*", "int8-channel", "smoothquant", activations="int8")))
    _, layers, changed = prepared(tmp_path, recipe, IDS, smoothing.prepare)
    assert len(changed) > len(layers) / 2


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_scales_are_those_of_the_paper(alpha, tmp_path):
    """Equation 4 in float64, of a float32 model: layers that a norm feeds together, and one that a layer feeds."""
    path = tiny.write_llama(tmp_path / "m", torch.float32)
    model = hf.load_causal_lm(path, dtype=torch.float32)
    block = "model.layers.0."
    inputs = inputs_of(model, [f"{block}self_attn.q_proj", f"{block}mlp.down_proj"], IDS)
    rule = Rule("*", "int8-channel", "smoothquant", SmoothOptions(alpha), "int8")
    with Workers() as workers:
        run, layers = block_run(path, Recipe("smooth", "", (rule,)), IDS, workers)
        before = {key: value.double().numpy().copy() for key, value in run.module.state_dict().items()}
        smoothing.prepare(run, layers)
        after = {key: value.double().numpy() for key, value in run.module.state_dict().items()}
    names = [f"self_attn.{p}_proj.weight" for p in "qkv"]
    w = np.stack([np.abs(before[name]).max(0) for name in names[:2]])
    x = np.abs(inputs[f"{block}self_attn.q_proj"]).max((0, 1))
    s = before["input_layernorm.weight"] / after["input_layernorm.weight"]
    for name in names[:2]:
        assert np.allclose(after[name] / before[name], s[None], rtol=1e-5), name
    # The rows of the values were divided by what feeds the attention's output before.
    v_divided = after["self_attn.v_proj.weight"] / s[None]
    w = np.maximum(w.max(0), np.abs(v_divided).max(0))
    assert np.allclose(s, x**alpha / w ** (1 - alpha), rtol=1e-5)

    x = np.abs(inputs[f"{block}mlp.down_proj"]).max((0, 1))
    w = np.abs(before["mlp.down_proj.weight"]).max(0)
    s = x**alpha / w ** (1 - alpha)
    assert np.allclose(after["mlp.down_proj.weight"], before["mlp.down_proj.weight"] * s, rtol=1e-5)
    norm = before["post_attention_layernorm.weight"] / after["post_attention_layernorm.weight"]
    assert np.allclose(
        after["mlp.up_proj.weight"], before["mlp.up_proj.weight"] * norm / s[:, None], rtol=1e-5
    )


def test_options_come_from_the_recipe_and_gptq_may_follow(source, text, tmp_path):
    (tmp_path / "r.toml").write_text(
        '[[rules]]\nformat = "int8-channel"\nmethod = "smoothquant"\nalpha = 0.6\nthen = "gptq"\n'
        'activations = "int8-static"\n'
    )
    rule = bitfold.recipes.read(tmp_path / "r.toml").rules[0]
    assert rule.options == SmoothOptions(0.6, "gptq")
    summary = quantize_calibrated(source, tmp_path / "q", tmp_path / "r.toml", text, **OPTIONS)
    for module in summary.modules:
        assert module.calibration.method == "smoothquant, gptq"
        assert 0 < module.calibration.output_error < module.calibration.rounding_error
        assert module.calibration.x_scale > 0
    for options in ({"alpha": 1.5}, {"alpha": -0.1}, {"then": "awq"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SmoothOptions(**options)


def test_another_architecture_is_refused_by_name(tmp_path, text):
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = StableLmConfig(vocab_size=tiny.VOCAB, num_key_value_heads=4, max_position_embeddings=64, **sizes)
    StableLmForCausalLM(config).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="the model is a 'stablelm', and which layers feed which"):
        quantize_calibrated(tmp_path / "m", tmp_path / "q", "smoothquant-w8a8", text, **OPTIONS)
    quantize_calibrated(tmp_path / "m", tmp_path / "q", "w8a8-static", text, **OPTIONS)


# ---- experts ----


@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_experts_are_smoothed_and_keep_nothing(kind, text, tmp_path):
    path = mixtures.write(tmp_path / "m", kind)
    for recipe in ("smoothquant-w8a8", "llm-int8"):
        quantize_calibrated(path, tmp_path / recipe, recipe, text, **OPTIONS)
        modules = json.loads((tmp_path / recipe / "config.json").read_text())["quantization_config"][
            "modules"
        ]
        stacks = [fields for fields in modules.values() if fields["kind"] == "experts"]
        assert stacks
        assert {fields["activations"] for fields in stacks} == {
            "int8" if recipe == "smoothquant-w8a8" else "llm-int8"
        }
        loaded = bitfold.load(tmp_path / recipe)
        with torch.no_grad():
            assert loaded(input_ids=IDS).logits.isfinite().all()
    with pytest.raises(ValueError, match="stack of experts"):
        quantize_calibrated(path, tmp_path / "q", "w8a8-static", text, **OPTIONS)


@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_a_smoothed_block_with_experts_computes_what_it_did(kind, tmp_path):
    fields = {"mlp_only_layers": []} if kind == "qwen3_moe" else {}
    mixtures.write(tmp_path, kind, torch.bfloat16, **fields)
    ids = torch.randint(2, tiny.VOCAB, (5, 24), generator=torch.Generator().manual_seed(0))
    with Workers() as workers:
        run, layers = block_run(tmp_path, bitfold.recipes.get("smoothquant-w8a8"), ids, workers)
        expected = outputs(run)
        norm = run.module.get_submodule("post_attention_layernorm").weight.clone()
        smoothing.prepare(run, layers)
        run.settle(run.stored)
        assert not torch.equal(run.module.get_submodule("post_attention_layernorm").weight, norm)
        found = outputs(run)
    assert tiny_architectures.relative_difference(found.double(), expected.double()) < 1e-5


# ---- stopped, and gone on; threads and processes ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_and_a_stop_change_no_byte(recipe, source, text, made, tmp_path, threads):
    threads(3)

    def stop(what: str, done: int, total: int) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(source, tmp_path / "q", recipe, text, **OPTIONS, progress=stop)
    quantize_calibrated(source, tmp_path / "q", recipe, text, **OPTIONS)
    assert contents(tmp_path / "q") == contents(made(recipe))


@pytest.mark.parametrize(
    "recipe", [pytest.param("llm-int8", marks=pytest.mark.slow), "smoothquant-w8a8-static"]
)
def test_killed_at_any_time_it_goes_on_to_the_same_bytes(recipe, source, text, made, tmp_path):
    quantize_with_kills(source, tmp_path / "q", recipe, text, "ram")
    assert contents(tmp_path / "q") == contents(made(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_other_activations_are_another_recipe(source, text, tmp_path):
    def stop(what: str, done: int, total: int) -> None:
        if what == "model.layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(source, tmp_path / "q", "llm-int8", text, **OPTIONS, progress=stop)
    with pytest.raises(CheckpointError, match="another recipe"):
        quantize_calibrated(source, tmp_path / "q", "llm-int8-t5", text, **OPTIONS)


@pytest.mark.parametrize("recipe", ["llm-int8", "smoothquant-w8a8-static"])
def test_two_processes_make_the_bytes_of_one(recipe, source, text, tmp_path):
    quantize_by_two_processes(source, tmp_path / "two", recipe, text, "--activations", "disk")
    quantize_calibrated(source, tmp_path / "one", recipe, text, **BUNDLES)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---- what is refused; the command line ----


def test_what_can_t_be_found_is_refused(source, text, tmp_path):
    def refusal(recipe, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            quantize_calibrated(source, tmp_path / "q", recipe, text, **OPTIONS)
        assert not (tmp_path / "q").exists()

    head = Recipe("head", "", (Rule("lm_head", "int8-channel", activations="int8-static"),))
    refusal(head, "lm_head the activations 'int8-static', but it is outside of the decoder blocks.*'int8'")
    refusal("w8a8", "no use for a text")
    with pytest.raises(ValueError, match="needs a text to calibrate on"):
        bitfold.quantize_checkpoint(source, tmp_path / "q", "w8a8-static")
    with pytest.raises(ValueError, match="needs a text to calibrate on"):
        bitfold.quantize_checkpoint(source, tmp_path / "q", "llm-int8-exact")

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].zero_()

    quiet = calibrated.write_model(tmp_path / "quiet")
    tiny.rewrite(quiet, silence)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs are zero throughout"
    ):
        quantize_calibrated(quiet, tmp_path / "q", "w8a8-static", text, **OPTIONS)


def test_the_command_says_what_was_found(source, text, made, tmp_path, capsys):
    options = ("--calibration", text, "--samples", 6, "--sequence-length", 32)
    code, out, _ = call(capsys, "quantize", source, tmp_path / "llm-int8", "--recipe", "llm-int8", *options)
    assert code == 0
    assert "16-bit columns" in out
    assert "output error" not in out
    assert contents(tmp_path / "llm-int8") == contents(made("llm-int8"))
    found = call_json(capsys, "quantize", source, tmp_path / "static", "--recipe", "w8a8-static", *options)
    assert found["modules"][0]["calibration"]["x_scale"] > 0
    rows = call_json(capsys, "inspect", tmp_path / "llm-int8")["entries"]
    assert "llm-int8-exact" in {row["activations"] for row in rows}
    code, out, _ = call(capsys, "check", tmp_path / "llm-int8")
    assert code == 0, out

    def scramble(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("outlier_columns"))
        tensors[name] = tensors[name].flip(0)

    tiny.rewrite(tmp_path / "llm-int8", scramble)
    code, out, _ = call(capsys, "check", tmp_path / "llm-int8")
    assert code != 0
    assert "ascending" in out
    with pytest.raises(CheckpointError, match="ascending"):
        bitfold.load(tmp_path / "llm-int8")


def test_recipes_by_name():
    for text, format, method, activations in [
        ("w8a8", "int8-channel", "rtn", "int8"),
        ("w8a8-static", "int8-channel", "rtn", "int8-static"),
        ("smoothquant-w8a8", "int8-channel", "smoothquant", "int8"),
        ("fp8-w8a8-static", "fp8-e4m3-channel", "rtn", "fp8-static"),
        ("gptq-w8a8-static", "int8-channel", "gptq", "int8-static"),
        ("smoothquant-llm-int8-t5", "int8-channel-sfp32", "smoothquant", "llm-int8-t5"),
        ("smoothquant-int4-g32", "int4-g32", "smoothquant", "float"),
    ]:
        (rule,) = bitfold.recipes.get(text).rules
        assert (rule.format, rule.method, str(rule.activations)) == (format, method, activations)
        assert bitfold.recipes.get(text).name == text
    for wrong in ("w8a8-dynamic", "smoothquant-w4a8", "smoothquant"):
        with pytest.raises(ValueError, match="unknown"):
            bitfold.recipes.get(wrong)


def test_what_a_layer_has_decides_what_it_does():
    for text, step, outliers, wanted in [
        ("int8-static", True, False, "int8-static"),
        ("int8-static", False, False, "int8"),
        ("llm-int8", False, True, "llm-int8-exact"),
        ("llm-int8-t5-exact", False, False, "llm-int8-t5"),
        ("int8", True, True, "int8"),
        ("float", False, False, "float"),
    ]:
        read = bitfold.activations.read(text)
        assert read.having(step=step, outliers=outliers) == bitfold.activations.read(wanted)
    assert [text for text in bitfold.activations.KINDS if text != "llm-int8" and Activations(text).gains] == [
        kind for kind in bitfold.activations.KINDS if kind.endswith("-static")
    ]
