"""The guide tells the truth: its commands print what it shows, its Python runs, its recipes are recipes, the API
reference has every public name."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import bitfold
import pytest
import tiny
from bitfold import recipes
from bitfold.cli.app import run
from tiny import one_thread  # noqa: F401

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = sorted(
    path.name
    for path in DOCS.glob("*.md")
    if path.name not in ("formats.md", "gguf-blocks.md", "architecture.md", "benchmarks.md")
)

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not beside the tests")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def cases(language: str) -> list:
    found = [(page, place, text) for page in GUIDE for place, text in enumerate(blocks(page, language))]
    return [pytest.param(page, text, id=f"{page}-{place}") for page, place, text in found]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with what the guide talks of: the examples, the model that is a config.json, the first recipe."""
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    (tmp_path / "llama-2-7b").mkdir()
    (tmp_path / "llama-2-7b" / "config.json").write_text(blocks("choose-a-recipe.md", "json")[0])
    large = json.loads(blocks("choose-a-recipe.md", "json")[0])
    large |= {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 64, "max_position_embeddings": 2048}
    (tmp_path / "llama-65b").mkdir()
    (tmp_path / "llama-65b" / "config.json").write_text(json.dumps(large))
    (tmp_path / "careful-attention.toml").write_text(blocks("choose-a-recipe.md", "toml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "text"), cases("console"))
def test_commands_print_what_the_page_shows(page, text, desk, capsys):
    if "--train" in text:
        pytest.importorskip("peft", reason="peft is not installed")
    for command, _, shown in (part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.M)[1:]):
        program, *arguments = shlex.split(command)
        assert program == "bitfold"
        code = run(arguments)
        out, err = capsys.readouterr()
        assert code == 0, err
        assert re.fullmatch(pattern(shown), out), (
            f"{page}: {command} printed\n{out}\nand the page shows\n{shown}"
        )


def pattern(shown: str) -> str:
    """A line of three dots stands for any lines, three dots within a line for anything on it."""
    lines = [
        r"(?:.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in shown.splitlines()
    ]
    return "".join(lines) + r"\n*"


@pytest.mark.parametrize(("page", "text"), cases("python"))
def test_python_runs(page, text, desk):
    for library in ("jax", "cupy", "peft"):
        if re.search(rf"^(import|from) {library}\b", text, re.M):
            reason = f"{library} is not installed"
            pytest.importorskip(library, reason=f"{reason}: it needs a GPU" if library == "cupy" else reason)
    exec(compile(text, str(DOCS / page), "exec"), {"__name__": "guide"})


@pytest.mark.parametrize(("page", "text"), cases("toml"))
def test_recipes_fit_a_model(page, text, tmp_path):
    """The demo model has tied embeddings, so an untied one of four layers; experts are in a model of their own."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    recipe = recipes.read(path)
    if "experts" in text:
        pytest.importorskip("transformers")
        modules = {
            "model.layers.0.mlp.experts.down_proj": recipes.ModuleInfo("experts", (4, 8, 8)),
            "model.layers.0.self_attn.q_proj": recipes.ModuleInfo("linear", (8, 8)),
        }
        assigned = recipes.assign(recipe, modules)
        assert [item.format for item in assigned.values()] == ["int4-g64", "int8-channel"]
        return
    source = tiny.write_llama(tmp_path / "m", layers=4)
    if (
        recipe.keeps_outlier_layers
    ):  # which layers a rule gets is for a text to say: each must fit all of them
        with pytest.raises(ValueError, match="keeps layers by what they lose on a text"):
            bitfold.plan_checkpoint(source, recipe)
        rules = [dataclasses.replace(rule, keep_outlier_layers=None) for rule in recipe.rules]
        plans = [bitfold.plan_checkpoint(source, recipes.Recipe("rule", "", (rule,))) for rule in rules]
    else:
        plans = [bitfold.plan_checkpoint(source, recipe)]
    assert all(plan.quantized_bits_per_weight < 16 for plan in plans)


def test_every_public_name_is_in_the_reference():
    named = set(re.findall(r"auto\w+:: bitfold\.(?:\w+\.)?(\w+)$", (DOCS / "api.md").read_text(), re.M))
    assert set(bitfold.__all__) - {"__version__"} <= named


@pytest.mark.slow  # CI runs `make docs`, which is the same build
def test_the_site_builds_without_a_warning(tmp_path):
    for library in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    arguments = ["-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "sphinx", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="bitfold.encode"' in (tmp_path / "api.html").read_text(encoding="utf-8")
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f'href="{page.stem}.html"' in start or page.stem == "index"
