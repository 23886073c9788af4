"""What `python -m build` makes: a wheel that works where nothing of the repository is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from paths import REPOSITORY, RESULTS

import mixquant
from mixquant.serve.containers import WHEEL

pytestmark = pytest.mark.slow

SOURCES = REPOSITORY / "src"
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, the wheel from the source distribution, as `python -m build` does."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("build") / "copy"
    shutil.copytree(REPOSITORY, copy, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stdout + done.stderr
    (wheel,), (sdist,) = (list((copy / "dist").glob(name)) for name in ("*.whl", "*.tar.gz"))
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def run(
    built: Built, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of an environment that has the wheel, and what it depends on from here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in such a file is added, but its own .pth files are not read: no editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    install += ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    done = subprocess.run([*install, str(built.wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / "bin" / program, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_the_image_of_rendered_sets_installs_this_wheel(built: Built) -> None:
    assert built.wheel.name == WHEEL


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    expected = {
        str(path.relative_to(SOURCES))
        for path in (SOURCES / "mixquant").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_source_distribution_holds_what_a_wheel_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert "src/mixquant/report/templates/page.html" in names
    assert not any(name.startswith(("tests", "docs", "benchmarks")) for name in names)


def test_the_metadata_are_valid(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(wheel.read(name), validate=True)
    assert metadata.name == "mixquant"
    assert str(metadata.version) == mixquant.__version__
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (REPOSITORY / "README.md").read_text()
    assert {"vllm", "serve", "quantize", "fp8-attention"} <= set(metadata.provides_extra or ())


def test_the_command_runs_from_the_wheel(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    version = run("mixquant", "--version")
    assert version.returncode == 0, version.stderr
    assert mixquant.__version__ in version.stdout
    page = tmp_path / "report.html"  # made of templates, which are data of the package
    report = run("mixquant", "report", RESULTS / "h100.json", "--out", page)
    assert report.returncode == 0, report.stderr
    assert "</style>" in page.read_text() and "NVIDIA H100" in page.read_text()


def test_the_package_is_imported_from_the_wheel(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """And its data and its plugin for vLLM are where others look for them."""
    code = """
import mixquant
from importlib.metadata import entry_points
from importlib.resources import files
assert "site-packages" in mixquant.__file__, mixquant.__file__
package = files("mixquant")
for name in ("py.typed", "bench/data/agent_trace.jsonl", "report/templates/page.css"):
    assert package.joinpath(name).is_file(), name
(plugin, *_) = entry_points(group="vllm.general_plugins", name="mixquant")
assert plugin.load().__module__ == "mixquant.engines.vllm.plugin"
print(mixquant.Recipe.load("fast").preset)
"""
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fast\n"
