"""What README and docs/ show holds: commands parse, code compiles or runs, tables are the files'.

A Python block behind ``<!-- run -->`` is run, those of a page in order and in one namespace, with
``path`` (a tiny model and its tokenizer) and ``elsewhere`` (an empty folder). A table behind the
paragraph "`python SCRIPT ARGUMENTS` prints:" holds cells of what that command prints.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from paths import REPOSITORY
from PIL import Image

from mixquant import Recipe
from mixquant.bench import trace
from mixquant.cli import app
from mixquant.kernels.cpu import compiled
from mixquant.serve.description import Deployment

DOCS = REPOSITORY / "docs"
DOCUMENTS = [
    *(
        REPOSITORY / name
        for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "deploy/README.md")
        if (REPOSITORY / name).is_file()
    ),
    *sorted(DOCS.rglob("*.md")),
]
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINNED = (REPOSITORY / "constraints.txt").read_text().splitlines()
SHELL = ("", "bash", "sh", "console")
# Output stands in blocks like commands do; these are the programs whose commands are checked.
CHECKED = re.compile(r"(\$ )?([A-Z_]+=\S+ )*(mixquant|vllm|make|pip|python3?|--\w+) ")
RUN = "<!-- run -->"
PRINTS = re.compile(r"`python (?P<command>[^`]*)` prints:")

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))


@dataclass(frozen=True)
class Block:
    """A fenced block, or a table."""

    language: str
    text: str
    line: int
    before: str  # the comment or paragraph right before it

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.before == RUN

    @property
    def printed_by(self) -> list[str]:
        """The command whose output the table holds, without `python`; empty if none is named."""
        found = PRINTS.fullmatch(self.before) if self.language == "table" else None
        return shlex.split(found["command"]) if found else []


@functools.cache
def parsed(path: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8"))


def blocks(path: Path) -> Iterator[Block]:
    before = ""
    for token in parsed(path):
        first, last = token.map or (0, 0)
        if token.type == "fence":
            yield Block(token.info, token.content, first + 1, before)
        elif token.type == "table_open":
            lines = path.read_text(encoding="utf-8").splitlines()[first:last]
            yield Block("table", "\n".join(lines), first + 1, before)
        if token.type in ("html_block", "inline"):
            before = token.content.strip()
        elif token.level == 0 and token.type != "paragraph_close":
            before = ""


def inline_code(path: Path) -> Iterator[str]:
    for token in parsed(path):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, up to a pipe or a redirection."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if not CHECKED.match(line):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        for end, word in enumerate(words):
            if word in ("|", ">", "&&", ";"):
                words = words[:end]
                break
        if words:
            yield words


def shell_commands(path: Path) -> Iterator[list[str]]:
    for block in blocks(path):
        if block.language in SHELL:
            yield from commands(block)


def check_recipe(text: str) -> None:
    """A recipe as commands take it; files, which are not there, by their names."""
    if not text.endswith(".json"):
        Recipe.load(text)


def options_of(command: Any) -> set[str]:
    return {
        name
        for one in command.params
        for name in (*one.opts, *one.secondary_opts)
        if name[0] == "-"
    } | {"--help", "-h"}


@document
def test_commands_of_mixquant_parse(path: Path) -> None:
    for words in shell_commands(path):
        if words[0] != "mixquant":
            continue
        if words[1] in ("--help", "--version"):
            continue
        assert words[1] in COMMANDS, shlex.join(words)
        with COMMANDS[words[1]].make_context(words[1], words[2:]) as context:
            given = context.params
        recipes = given.get("recipe") or []
        for recipe in [recipes] if isinstance(recipes, str) else recipes:
            check_recipe(recipe)
        if isinstance(given.get("format"), str):
            Recipe.from_dict({"format": given["format"]})


@document
def test_options_named_in_the_text_exist(path: Path) -> None:
    for code in inline_code(path):
        words = code.split()
        ours = words[: words.index("--")] if "--" in words else words
        named = {word for word in ours if word.startswith("--")}
        if words[:1] != ["mixquant"] or len(words) < 2 or words[1] == "COMMAND":
            continue
        if not named and words[1] not in COMMANDS:
            continue  # the beginning of a message, say
        assert words[1] in COMMANDS, code
        assert named <= options_of(COMMANDS[words[1]]), code


@document
def test_other_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    for words in shell_commands(path):
        line = shlex.join(words)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0].startswith("python") and words[1].endswith(".py"):
            source = (REPOSITORY / words[1]).read_text()
            for word in words[2:]:
                assert not word.startswith("--") or f'"{word}"' in source, line
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"mixquant\[(.*?)\]", line):
                assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"]), line
            assert {word for word in words if "==" in word and "[" not in word} <= set(PINNED), line
        for option, value in pairwise(words):
            if option == "--additional-config":
                recipe = json.loads(value)["mixquant"]
                Recipe.from_dict(recipe) if isinstance(recipe, dict) else check_recipe(recipe)
            elif option == "--kv-transfer-config":
                json.loads(value)


@document
def test_python_compiles(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            compile("\n" * block.line + block.text, str(path), "exec")


MARKED = [path for path in DOCUMENTS if any(block.runs for block in blocks(path))]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.build("llama").bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 3, "Why": 4, "sky": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("page", MARKED, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_marked_python_runs(
    page: Path, tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(compiled, "_failure", "compiling takes longer than all of this")
    namespace = {"path": tiny_checkpoint, "elsewhere": str(tmp_path)}
    for block in blocks(page):
        if block.runs:
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


@document
def test_json_and_yaml_are_what_they_show(path: Path) -> None:
    for block in blocks(path):
        if block.language == "json":
            values = json.loads(block.text)
            if "session" in values:
                assert trace.parse(json.dumps(values), "the page")
            elif "mixquant" in values:
                Recipe.from_dict(values["mixquant"])
            else:
                Recipe.from_dict(values)
        elif block.language == "yaml":
            values = pytest.importorskip("yaml").safe_load(block.text)
            if "scrape_configs" not in values:  # Prometheus's
                Deployment.from_values(values)


@document
def test_linked_files_exist(path: Path) -> None:
    for token in parsed(path):
        for child in token.children or ():
            link = child.attrs.get("href") or child.attrs.get("src")
            if not isinstance(link, str) or re.match(r"[a-z]+:", link) or link.startswith("#"):
                continue
            assert (path.parent / link.partition("#")[0]).exists(), link


@document
def test_named_files_exist(path: Path) -> None:
    for code in inline_code(path):
        for name in re.findall(r"(?:benchmarks|docs|examples|scripts|tests)/[\w./-]*\w", code):
            assert (REPOSITORY / name).exists(), name


def test_modules_named_in_the_architecture_exist() -> None:
    package = REPOSITORY / "src" / "mixquant"
    roots = (
        package,
        package / "engines" / "vllm",
        package / "engines" / "transformers",
        REPOSITORY,
    )
    named = re.compile(r"[\w./]+(\.py|/)")
    names = {
        code for code in inline_code(DOCS / "develop" / "architecture.md") if named.fullmatch(code)
    }
    assert len(names) > 20
    for name in names:
        assert any((root / name).exists() for root in roots), name


def test_pages_named_in_the_sources_exist() -> None:
    for folder in ("src", "benchmarks", "scripts", "tests"):
        for source in (REPOSITORY / folder).rglob("*.py"):
            for name in re.findall(r"docs/[\w./-]+\.md", source.read_text(encoding="utf-8")):
                assert (REPOSITORY / name).is_file(), f"{source}: {name}"


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by heading."""
    heading, _, *rows = (
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()
    )
    return [dict(zip(heading, row, strict=True)) for row in rows]


TABLES = [(path, block) for path in DOCUMENTS for block in blocks(path) if block.printed_by]


@pytest.mark.parametrize(("path", "block"), TABLES, ids=[f"{p.stem}-{b.line}" for p, b in TABLES])
def test_tables_are_what_the_files_hold(
    path: Path, block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = block.printed_by
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    tables = capsys.readouterr().out.strip().split("\n\n")
    printed = [row for table in tables if table.startswith("|") for row in cells(table)]
    shown = cells(block.text)
    assert shown
    for row in shown:
        assert any(row.items() <= one.items() for one in printed), row


@pytest.mark.parametrize("file", sorted((REPOSITORY / "benchmarks/results").glob("*.json")))
def test_results_name_no_folder_of_the_machine_that_measured(file: Path) -> None:
    assert not re.findall(r"""[\s='"][/~]+\w[^\s'"]*""", file.read_text())


def test_results_are_in_marked_tables() -> None:
    """Nothing is a result that no file holds."""
    for block in blocks(DOCS / "results" / "index.md"):
        assert block.language != "table" or block.printed_by, f"line {block.line}"


def test_what_the_results_say_of_formats_by_layer() -> None:
    page = " ".join((DOCS / "results" / "index.md").read_text(encoding="utf-8").split())
    recipes = []
    for name in ("", "_24", "_1024", "_gptq", "_gptq_955", "_gptq_4k", "_gptq_2048"):
        file = REPOSITORY / "benchmarks" / "results" / f"tune_smollm2{name}.json"
        arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
        recipes.append(Recipe.from_dict(next(a["recipe"] for a in arms if a["name"] == "tuned")))

    def in_fp8(projection: str) -> list[int]:
        layers = [f"model.layers.{n}.{projection}" for n in range(30)]
        return [sum(one.format_of(layer) == "fp8" for layer in layers) for one in recipes]

    keys, values = in_fp8("self_attn.k_proj"), in_fp8("self_attn.v_proj")
    assert f"the keys of {min(keys)} to {max(keys)} of 30 layers" in page
    assert f"the values of {min(values)} to {max(values)} have FP8, and one `down_proj`" in page
    assert sum(in_fp8("mlp.down_proj")) == sum(in_fp8("mlp.up_proj")) == 1
    assert not any(in_fp8("self_attn.o_proj"))


@pytest.mark.parametrize("name", ["reference/commands.md", "develop/patches.md"])
def test_pages_made_from_the_code_are_current(name: str) -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "reference_pages.py"))
    assert (DOCS / name).read_text(encoding="utf-8") == script["PAGES"][name](), (
        "run python scripts/reference_pages.py"
    )


def test_the_page_of_recipe_keys_has_every_key_and_default() -> None:
    path = DOCS / "reference" / "recipe.md"
    table, example = (
        next(block for block in blocks(path) if block.language == language)
        for language in ("table", "json")
    )
    shown = {row["key"].strip("`"): row["default"] for row in cells(table.text)}
    assert list(shown) == [one.name for one in fields(Recipe)]  # type: ignore[arg-type]
    defaults = Recipe().to_dict()
    assert {key: json.loads(text.strip("`")) for key, text in shown.items()} == defaults
    assert json.loads(example.text) == defaults


def test_the_page_of_the_deployment_file_has_every_key_and_default() -> None:
    yaml = pytest.importorskip("yaml")
    text = next(
        block.text
        for block in blocks(DOCS / "reference" / "deployment.md")
        if block.language == "yaml"
    )
    shown = yaml.safe_load(text)
    assert {*shown, "api_key_file"} == set(Deployment.model_fields)
    described = Deployment.from_values(shown)
    differing = {
        name
        for name, field in Deployment.model_fields.items()
        if not field.is_required()
        and getattr(described, name) != field.get_default(call_default_factory=True)
    }
    assert differing == {
        "served_model_name",
        "prefill",
        "decode",
        "prefill_gpus",
        "decode_gpus",
        "log_folder",
        "api_key_variable",
        "vllm_arguments",
        "decode_arguments",
        "environment",
        "metrics_port",
    }


def test_the_page_of_environment_variables_has_every_variable() -> None:
    inner = {"MIXQUANT_API_KEY", "MIXQUANT_ENGINE_KEY"}  # from one process of a set to another
    used = {
        name
        for source in (REPOSITORY / "src").rglob("*.py")
        for name in re.findall(r"MIXQUANT_[A-Z_]+[A-Z]", source.read_text(encoding="utf-8"))
    }
    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    assert used - inner == set(re.findall(r"MIXQUANT_[A-Z_]+[A-Z]", page))


def test_the_picture_of_the_report_shows_the_committed_figures() -> None:
    source = REPOSITORY / "benchmarks" / "results" / "attention_speed_h100.json"
    with Image.open(REPOSITORY / "docs" / "images" / "report.png") as picture:
        assert picture.info["source"] == hashlib.sha256(source.read_bytes()).hexdigest(), (
            "run scripts/report_screenshot.py"
        )
