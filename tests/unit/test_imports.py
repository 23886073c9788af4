"""What imports what: which modules a process loads, and that imports point down only."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import HELPERS, REPOSITORY

import mixquant

SOURCES = Path(mixquant.__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
ASKS_FOR_VLLM = r"(require_vllm\(\)|pytest\.importorskip\(['\"]vllm['\"])"
HEAVY = ("torch", "transformers", "torchao", "gguf", "vllm")
# From the ground up: a module imports from its own layer and from those before it. What is in
# mixquant/__init__, and what it needs to stay lean, stands above the engines that it exports.
LAYERS = (
    ("_version", "errors", "files", "hardware", "_after_import"),
    ("kernels",),
    ("formats",),
    ("core",),
    ("checkpoints", "results"),
    ("conversation",),
    ("engines",),
    ("mixquant", "_registration"),
    ("servers",),
    ("bench", "evaluate", "report", "serve"),
    ("tune",),
    ("cli",),
)


def modules() -> dict[str, Path]:
    found = {}
    for file in SOURCES.rglob("*.py"):
        parts = file.relative_to(SOURCES.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a module, those inside functions included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for statement in child.orelse:
                yield from statements(statement)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from statements(child)


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each module of mixquant those that it imports."""
    files = modules()
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        names = set()
        for statement in statements(ast.parse(file.read_text())):
            if isinstance(statement, ast.Import):
                names |= {alias.name for alias in statement.names}
            else:
                assert statement.level == 0, f"{module}: a relative import"
                for alias in statement.names:
                    whole = f"{statement.module}.{alias.name}"
                    names.add(whole if whole in files else str(statement.module))
        graph[module] = {name for name in names if name in files}
    return graph


def when_loaded(file: Path) -> Iterator[str]:
    """What a file imports when it is loaded, up to where it asks whether vLLM is there."""
    rest: list[ast.stmt] = ast.parse(file.read_text()).body
    while rest:
        node, *rest = rest
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            rest = [*node.body, *node.orelse, *rest]
        elif isinstance(node, ast.Expr) and re.match(ASKS_FOR_VLLM, ast.unparse(node)):
            return


def layer(module: str) -> int:
    package = [*module.split("."), "mixquant"][1]
    return next(index for index, packages in enumerate(LAYERS) if package in packages)


def loaded_after(code: str) -> set[str]:
    """The modules that a process of its own has loaded after some code."""
    shown = "import json, sys; print('\\n' + json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", f"{code}\n{shown}"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_no_import_runs_up() -> None:
    up = [
        f"{module} imports {name}"
        for module, names in imports().items()
        for name in names
        if layer(name) > layer(module)
    ]
    assert not up


def test_no_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_engines_do_not_import_each_other() -> None:
    engines = ("mixquant.engines.transformers", "mixquant.engines.vllm")
    for module, names in imports().items():
        for one, other in (engines, engines[::-1]):
            if module.startswith(one):
                assert not [name for name in names if name.startswith(other)], module


def test_nothing_imports_the_package_itself() -> None:
    assert not [module for module, names in imports().items() if "mixquant" in names]


def test_unit_tests_can_be_collected_without_vllm() -> None:
    """As `make check` does. With vLLM, as in CI, no other test would see an import too many."""
    files = modules() | {file.stem: file for file in HELPERS.glob("*.py")}
    loaded = {name: set(when_loaded(file)) for name, file in files.items()}
    need, before = {"vllm"}, 0
    while len(need) > before:
        before = len(need)
        need |= {
            name
            for name, imported in loaded.items()
            if any(one in need or one.startswith("vllm.") for one in imported)
        }
    assert len(need) > 10
    for file in (REPOSITORY / "tests" / "unit").rglob("*.py"):
        found = {one for one in when_loaded(file) if one in need or one.startswith("vllm.")}
        assert not found, f"{file}: needs vLLM before it asks for it"


def test_importing_mixquant_loads_no_library() -> None:
    loaded = loaded_after("import mixquant; dir(mixquant)")
    assert not loaded & {*HEAVY, "numpy", "pydantic", "rich"}
    assert {name for name in loaded if name.startswith("mixquant.")} == {
        "mixquant._after_import",
        "mixquant._registration",
        "mixquant._version",
    }


def test_no_heavy_library_is_loaded_before_it_is_used() -> None:
    code = """
import mixquant.core.recipe, mixquant.core.summary, mixquant.core.layer_names
import mixquant.core.phase
import mixquant.checkpoints.models
import mixquant.conversation, mixquant.results
import mixquant.serve.supervisor, mixquant.serve.front, mixquant.report.page
"""
    assert not loaded_after(code) & set(HEAVY)


def test_help_imports_no_torch() -> None:
    code = "from mixquant.cli import main"
    for option in ("--help", "--version", "serve --help", "evaluate --help"):
        code += f"\nassert main({option.split()}) == 0"
    assert not loaded_after(code) & set(HEAVY)


def test_the_plugin_does_not_reach_the_transformers_engine() -> None:
    graph, reached = imports(), {"mixquant.engines.vllm.plugin"}
    rest = list(reached)
    while rest:
        new = graph[rest.pop()] - reached
        reached |= new
        rest += new
    assert len(reached) > 20
    assert not [name for name in reached if name.startswith("mixquant.engines.transformers")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["transformers.quantizers.auto", "mixquant.engines.vllm.settings"]
)
def test_no_library_speaks_before_a_command_does(module: str) -> None:
    if "vllm" in module:
        pytest.importorskip("vllm", reason="vLLM is not installed")
    code = f"from mixquant.cli import main\nmain(['--version'])\nimport {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"mixquant {mixquant.__version__}\n"
