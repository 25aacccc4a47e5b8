"""The report: its numbers against slow ways to them, and the page in a browser."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import bitfold
import browser as chromium
import numpy as np
import oracle
import oracle_encode
import pytest
import tiny
import torch
from bitfold import grids, hf
from bitfold.cli.app import run
from bitfold.evaluate import compare, cut
from bitfold.outliers.measure import measure as measure_outliers
from bitfold.pages import colours
from bitfold.recipes import Recipe, Rule
from bitfold.report import measure as measuring
from bitfold.report.draw import save
from bitfold.report.measure import Options, Report, measure
from bitfold.report.page import all_plots, render, save_plots
from bitfold.report.plots import is_best
from bitfold.report.sizes import class_name, place
from bitfold.sensitivity import measure as sensitivity
from bitfold.sensitivity.ground import Texts
from bitfold.text import joined
from browser import browser  # noqa: F401
from tiny import one_thread  # noqa: F401

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TRIED = ("int8", "nf4", "int3-g64", "int4-g128", "fp16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("report") / "demo-int4"
    bitfold.quantize_checkpoint(DEMO / "model", target, "int4-g128")
    return target


@pytest.fixture(scope="module")
def report(checkpoint) -> Report:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    return measure(
        checkpoint,
        Options(DEMO / "model", text, recipes=TRIED, tokens=512, attribution_tokens=256, context=64),
    )


@pytest.fixture(scope="module")
def page(report, checkpoint) -> Path:
    path = checkpoint.parent / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path


# ---- grids ----


@pytest.mark.parametrize(
    "format", ["int8", "int4-g32", "int4-g16-asym", "int2", "nf4", "nf4-b64-dq", "fp4", "fp8"]
)
def test_grids_are_those_of_the_specification(format, rng):
    weight = torch.from_numpy(rng.normal(size=(6, 160)).astype(np.float32))
    q = bitfold.encode(weight, format)
    planes = oracle_encode.encode(weight.numpy(), q.format)
    kind = oracle.parse(q.format)
    codes = np.arange(2**kind.bits, dtype=np.uint8)
    zeros = np.zeros_like(codes) if kind.asymmetric else None
    values = kind.grid.value(codes, zeros)
    np.testing.assert_array_equal(grids.grid(format).numpy(), np.unique(values[np.isfinite(values)]))
    logical = oracle.unpack(planes, q.format, 6, 160)
    scales = grids.scales(q).numpy()
    where = grids.positions(weight, q).numpy()
    nearest = values[np.nan_to_num(np.abs(where[..., None] - values), nan=np.inf).argmin(-1)]
    offset = 0 if grids.zeros(q) is None else grids.zeros(q).numpy()
    if kind.scale != "nested":  # there the codes were chosen with the scale before nesting
        np.testing.assert_array_equal((nearest - offset) * scales, oracle.decode(planes, q.format, 6, 160))
    used = len(np.unique(logical.codes))
    shares = np.bincount(logical.codes.flatten()) / logical.codes.size
    entropy = -sum(p * math.log2(p) for p in shares if p > 0)
    assert grids.code_entropy(q) == (used, pytest.approx(entropy))


def test_casts_have_no_grid():
    assert grids.grid("fp16") is None
    with pytest.raises(ValueError, match="must be one with a plane of scales"):
        grids.scales(bitfold.encode(torch.ones(2, 2), "bf16"))


def test_a_group_of_zeros_lies_at_zero():
    for format in ("int4-g16", "int4-g16-asym", "nf4-b32"):
        q = bitfold.encode(torch.zeros(2, 32), format)
        assert not grids.positions(torch.zeros(2, 32), q).any()


# ---- sizes ----


def test_bytes_and_bits(report, checkpoint):
    stored = tiny.tensors_of(checkpoint)
    assert report.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.base_bytes == sum(tensor.nbytes for tensor in tiny.tensors_of(DEMO / "model").values())
    assert sum(one.nbytes for one in report.classes) == report.nbytes
    assert sum(one.source_bytes for one in report.classes) == report.base_bytes
    layer = next(tensor for tensor in report.tensors if tensor.name == "model.layers.1.mlp.up_proj")
    assert layer.planes == {"codes": 768 * 128, "scales": 768 * 2 * 2}
    assert layer.bits_per_weight == 4.125
    assert layer.source_bytes == 768 * 256 * 2


def test_names():
    assert class_name("model.layers.3.mlp.up_proj") == "layers.*.mlp.up_proj"
    assert class_name("model.layers.12.mlp.experts.7.w1.weight") == "layers.*.mlp.experts.*.w1"
    assert class_name("transformer.h1.fc2") == "transformer.h1.fc2"
    assert place("model.layers.3.mlp.up_proj") == ("3", "mlp.up_proj")
    assert place("model.embed_tokens") == ("", "embed_tokens")
    assert joined(["model.layers.0.attn.q_proj", "model.layers.0.attn.k_proj"]) == "layers.0.attn.{q,k}_proj"
    assert joined(["a.gate", "a.up"]) == "a.{gate,up}"
    assert joined(["model.lm_head"]) == "lm_head"


# ---- errors ----


def test_relative_errors(report, checkpoint):
    base, model = tiny.tensors_of(DEMO / "model"), bitfold.load(checkpoint)
    assert len(report.modules) == 28
    for module in report.modules[::9]:
        source = base[f"{module.name}.weight"].double().numpy()
        decoded = model.get_submodule(module.name).qtensor.decode().double().numpy()
        wanted = np.linalg.norm(decoded - source) / np.linalg.norm(source)
        assert module.relative_rmse == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.2.self_attn.k_proj"])
def test_attribution_is_the_kl_of_this_weight_alone(report, name):
    """Another way to the same: a copy of the base, of which a recipe quantizes one layer."""
    base = hf.load_causal_lm(DEMO / "model", dtype=torch.float32)
    alone = copy.deepcopy(base)
    bitfold.quantize(alone, Recipe("one", "", (Rule(name, "int4-g128"),)), quiet=True)
    tokenizer = hf.load_tokenizer(DEMO / "model")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(text, tokenizer, context=32, max_tokens=256, dtype=torch.float32)
    wanted = compare(base, alone, windows).mean_kl
    found = next(module.kl for module in report.modules if module.name == name)
    assert windows.protocol == report.attribution_protocol
    assert found.value == pytest.approx(wanted.value, rel=1e-6)
    assert found.error == pytest.approx(wanted.error, rel=1e-6)
    assert found.value > 0


def test_recipes_in_memory_are_those_of_checkpoints(report):
    """int4-g128 is both the checkpoint and one of the recipes that were tried."""
    first, again = (one for one in report.tried if one.name == "int4-g128")
    assert (first.checkpoint is None, again.checkpoint is None) == (False, True)
    assert first.nbytes == again.nbytes == report.nbytes
    assert first.bits_per_weight == again.bits_per_weight == 4.125
    assert first.comparison == again.comparison
    by_name = {one.name: one for one in report.tried}
    assert by_name["int8"].comparison.mean_kl.value < by_name["int3-g64"].comparison.mean_kl.value
    assert by_name["fp16"].comparison.mean_kl.value < 1e-9
    assert by_name["fp16"].nbytes == report.base_bytes
    beaten = [one.name for one in report.tried if not is_best(one, report.tried)]
    assert "int8" not in beaten


def test_tied_weights_are_one(tmp_path):
    source = tiny.write_llama(tmp_path / "model", torch.float32, tied=True)
    recipe = tmp_path / "all.toml"
    recipe.write_text(
        '[[rules]]\nmatch = "*.embed_tokens"\nformat = "int8"\n[[rules]]\nmatch = "lm_head"\nformat = "int8"\n'
    )
    bitfold.quantize_checkpoint(source, tmp_path / "q", recipe)
    found = measure(tmp_path / "q", Options(source, tiny.TEXT, tokens=128, attribution_tokens=128))
    (module,) = found.modules
    assert set(module.names) == {"model.embed_tokens", "lm_head"}
    # Quantizing this weight alone is quantizing all of this recipe.
    whole = measure(
        tmp_path / "q", Options(source, tiny.TEXT, tokens=128, attribution_tokens=128, context=16)
    )
    assert module.kl.value == pytest.approx(whole.tried[0].comparison.mean_kl.value, rel=1e-9)
    assert "lm_head" in render(found)


# ---- outliers ----


def test_outliers_are_those_of_the_base(report, page):
    """What `bitfold outliers` measures of the base on the same windows (test_outliers.py compares that with numpy)."""
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(text, hf.load_tokenizer(DEMO / "model"), context=32, max_tokens=256, dtype=torch.float32)
    found = measure_outliers(DEMO / "model", torch.stack(windows.ids))
    assert report.calibration_protocol == windows.protocol
    assert report.outliers == found
    shown = page.read_text(encoding="utf-8")
    for layer in found.layers[:3]:
        for loss in layer.losses.values():
            assert f"<td>{loss:.3%}</td>" in shown
    assert found.recurring
    for channel in found.recurring:
        assert f'<th scope="row">{channel.index}</th><td>{channel.norms}</td>' in shown
    assert [one.names for one in report.weight_columns] == [(m.name,) for m in report.modules]


# ---- the page ----


class Outline(HTMLParser):
    """Headings, ids and links of a page, and whether its pictures and regions have names."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unnamed: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if values.get("role") in ("img", "region") and not values.get("aria-label"):
            self.unnamed.append(tag)
        if tag == "th" and "scope" not in values:
            self.unnamed.append(tag)
        self.addresses += [
            values[key] for key in ("src", "href", "xlink:href", "data", "action") if values.get(key)
        ]


def check_page(text: str) -> None:
    outline = Outline(text)
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert outline.unnamed == []
    assert all(address.startswith(("#", "data:,")) for address in outline.addresses)
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_page(report, page):
    text = page.read_text(encoding="utf-8")
    check_page(text)
    assert "<script" not in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2 * len(all_plots(report)) == 18
    for picture in pictures:
        assert not re.search(r"#[0-9a-f]{6}", picture), "a colour that doesn't follow the theme"
    for name in ("model.layers.0.mlp.down_proj", "int4-g128", "int3-g64"):
        assert name in text
    assert "Nearer than 1e-09 nats, and so not drawn: fp16" in text


def test_numbers_in_a_picture_are_not_cut(report, page):
    """SVGs are shortened within their tags; what stands between is what was measured."""
    picture = re.search(
        r"<svg(?:(?!<svg).)*KL alone \(10⁻³ nats per token\)</text>.*?</svg>",
        page.read_text(encoding="utf-8"),
        re.DOTALL,
    ).group()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    for module in report.modules[:4]:
        assert f"{1e3 * module.kl.value:#.3g}".rstrip(".") in texts


def test_colours_have_contrast():
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text, on both grounds, in both themes."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    found = colours()
    for theme in (0, 1):
        for ground in ("paper", "raised"):
            for text in ("ink", "muted", "accent", "second", "third"):
                one, two = luminance(found[ground][theme]), luminance(found[text][theme])
                contrast = (max(one, two) + 0.05) / (min(one, two) + 0.05)
                assert contrast >= 4.5, (text, ground, theme, contrast)


def test_without_a_base(checkpoint):
    """Sizes, the errors that quantizing noted, and the use of codes; the rest says what is wanting."""
    found = measure(checkpoint, Options())
    text = render(found)
    check_page(text)
    assert text.count("Not measured") == 6
    noted = json.loads((checkpoint / "bitfold_report.json").read_text())["modules"]
    assert {m.name: m.relative_rmse for m in found.modules} == {m["name"]: m["relative_rmse"] for m in noted}
    assert set(all_plots(found)) == {"bytes", "relative"}


def test_with_a_base_and_no_text(checkpoint):
    found = measure(checkpoint, Options(DEMO / "model"))
    assert set(all_plots(found)) == {"bytes", "relative", "grid", "weight-columns"}
    assert all(
        sum(h.counts) == math.prod(m.shape) for h, m in zip(found.histograms, found.modules, strict=True)
    )
    assert not found.tried
    assert not found.activation_columns
    assert {m.kl for m in found.modules} == {None}


def test_plots_as_files(report, tmp_path):
    paths = save_plots(report, tmp_path / "plots")
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert len(paths) == 18
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert b"var(--" not in data
    again = save(all_plots(report)["size"].draw, tmp_path / "size")
    assert [path.read_bytes() for path in again] == [
        path.read_bytes() for path in paths if path.stem == "size"
    ]


# ---- the command ----


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run(["report", *(str(argument) for argument in arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("small")
    source = tiny.write_llama(folder / "model", torch.float32)
    for recipe in ("int4-g32", "int8"):
        bitfold.quantize_checkpoint(source, folder / recipe, recipe)
    (folder / "text.txt").write_text(tiny.TEXT)
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_bytes((source / "config.json").read_bytes())
    return SimpleNamespace(
        base=source,
        q4=folder / "int4-g32",
        q8=folder / "int8",
        text=folder / "text.txt",
        config=folder / "config",
    )


def test_the_command(capsys, small, tmp_path):
    path = tmp_path / "r.html"
    code, out, err = call(
        capsys, small.q4, small.q8, "-o", path, "--base", small.base, "--text", small.text, "--try", "nf4, fp8",
        "--tokens", 128, "--attribution-tokens", 64, "--plots", tmp_path / "plots", "--json",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(out)
    assert data["output"] == str(path)
    assert [one["name"] for one in data["tried"]] == ["int4-g32", "int8", "nf4", "fp8"]
    assert data["tried"][1]["checkpoint"] == str(small.q8)
    assert len(data["modules"]) == 14
    assert data["modules"][0]["kl"]["value"] > data["modules"][0]["kl"]["error"] > 0
    assert {tensor["bits_per_weight"] for tensor in data["tensors"] if tensor["quantized"]} == {4.5}
    assert all(Path(name).exists() for name in data["plots"])
    assert "counts" not in data["histograms"][0]
    assert Outline(path.read_text(encoding="utf-8")).headings[0] == 1
    code, out, err = call(capsys, small.q4, "-o", path)
    assert code == 0, err
    assert str(path) in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{base}"], "is not quantized"),
        (["{q4}/no"], "does not exist"),
        (["{q4}", "--text", "{text}"], "add --base"),
        (["{q4}", "--try", "nf4"], "add --base"),
        (["{q4}", "{q8}"], "add --base"),
        (["{q4}", "--base", "{base}", "--try", "nf4"], "add --text"),
        (["{q4}", "--base", "{demo}"], "not its base model"),
        (["{q4}", "--base", "{base}", "--text", "{text}", "--try", "int44"], "int44"),
        (["{q4}", "--base", "{base}", "--text", "{q4}/none.txt"], "none.txt"),
        (["{q4}", "--tokens", "-1"], "--tokens is -1"),
        (["{q4}", "--dtype", "int8"], "--dtype"),
        (["{q4}", "-o", "{q4}/no/r.html"], "in a directory that doesn't exist"),
        (["{config}"], "is not quantized"),
        (["{q4}", "--base", "{config}"], "safetensors"),
    ],
)
def test_errors_are_one_sentence(capsys, small, arguments, words):
    names = {**vars(small), "demo": DEMO / "model"}
    filled = [argument.format(**names) for argument in arguments]
    if "-o" not in filled:
        filled += ["-o", str(small.q4.parent / "unwritten.html")]
    code, out, err = call(capsys, *filled, *([] if "--tokens" in filled else ["--tokens", "64"]))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (small.q4.parent / "unwritten.html").exists()


def test_what_every_weight_would_lose(capsys, small, tmp_path):
    found = tmp_path / "found.json"
    measured = sensitivity.measure(
        small.base, Texts(tiny.TEXT, 128, 64), ["int4-g32", "int2-g32"], output=found
    )
    path = tmp_path / "r.html"
    code, out, err = call(capsys, small.q4, "-o", path, "--sensitivity", found, "--json")
    assert code == 0, err
    data = json.loads(out)["sensitivity"]
    assert len(data["entries"]) == len(measured.entries) == 28
    text = path.read_text(encoding="utf-8")
    check_page(text)
    assert "is 0 nats away from itself" in text
    section = text[text.index('id="sensitivity"') : text.index('id="grid"')]
    assert section.count("<svg") == 2
    one = measured.find("model.layers.1.mlp.down_proj", "int2-g32")
    assert f"{one.output_error:.3%}" in section
    assert f"{measured.additivity[0].ratio:.3f}" in section
    code, _, err = call(capsys, small.q4, "-o", path, "--sensitivity", small.text)
    assert (code, err.count("\n")) == (2, 1)
    other = json.loads(found.read_text())
    other["modules"] = {f"other.{name}": fields for name, fields in other["modules"].items()}
    other["entries"] = []
    found.write_text(json.dumps(other))
    code, _, err = call(capsys, small.q4, "-o", path, "--sensitivity", found)
    assert (code, "of another model" in err) == (2, True)


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_missing_extra(small, library):
    script = f"import sys; sys.modules[{library!r}] = None; from bitfold.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "report", str(small.q4)],
        capture_output=True,
        text=True,
        cwd=small.base,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "bitfold[report]" in done.stderr


def test_attribution_leaves_the_base_as_it_was(small, monkeypatch):
    bases = []
    load = hf.load_causal_lm
    monkeypatch.setattr(
        measuring.hf, "load_causal_lm", lambda *a, **k: bases.append(load(*a, **k)) or bases[-1]
    )
    measure(small.q4, Options(small.base, tiny.TEXT, tokens=64, attribution_tokens=64, context=32))
    fresh = load(small.base, dtype=torch.float32)
    assert [type(m) for m in bases[0].modules()] == [type(m) for m in fresh.modules()]
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(bases[0].state_dict()[name], tensor)


# ---- in a browser ----


@pytest.mark.parametrize("width", chromium.WIDTHS)
@pytest.mark.parametrize("theme", chromium.THEMES)
def test_the_page_loads_nothing_and_fits(browser, page, width, theme):  # noqa: F811
    chromium.visit(browser, page, width, theme)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert chromium.console(browser) == []
    assert chromium.requests(browser) == []
    assert chromium.overflowing(browser) <= 0
    assert chromium.covering_labels(browser, "figure svg") == []
    assert (sum(chromium.background(browser)) > 3 * 128) == (theme == "light")
    visible = (
        "return [...document.querySelectorAll('figure svg')].filter((s) => s.getClientRects().length).length"
    )
    assert browser.execute_script(visible) == 9


def test_the_switch_and_the_colours_of_pictures(browser, page):  # noqa: F811
    chromium.visit(browser, page, theme="dark")
    ink = "return getComputedStyle(document.querySelector('figure svg text')).fill"
    dark = browser.execute_script(ink)
    browser.find_element("id", "theme-light").click()
    assert sum(chromium.background(browser)) > 3 * 128
    assert browser.execute_script(ink) != dark


def test_the_page_without_a_mouse(browser, page):  # noqa: F811
    """Tab goes to the link that skips the header, then to sections, tables can be opened and scrolled."""
    chromium.visit(browser, page)
    body = browser.find_element("tag name", "body")
    body.send_keys("\ue004")
    skip = browser.switch_to.active_element
    assert skip.get_attribute("class") == "skip"
    assert skip.location["x"] >= 0
    skip.send_keys("\ue007")
    assert browser.current_url.endswith("#content")
    summary = browser.find_element("css selector", "summary")
    summary.send_keys("\ue007")
    region = browser.find_element("css selector", "details[open] [role=region]")
    assert region.is_displayed()
    summary.send_keys("\ue004")
    assert browser.switch_to.active_element == region
