"""Which modules a process of vLLM has loaded once it has loaded the plugin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mixquant

pytest.importorskip("vllm")

CODE = """
import json, sys
from mixquant.engines.vllm.plugin import register
register()
print()
print(json.dumps([name for name in sys.modules if name.startswith(("mixquant", "transformers"))]))
"""


def test_the_plugin_does_not_load_the_transformers_engine() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(mixquant.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "mixquant.engines.vllm.settings" in loaded
    assert "transformers.quantizers.auto" in loaded  # vLLM's: the method is registered there, too
    assert not [name for name in loaded if name.startswith("mixquant.engines.transformers")]
