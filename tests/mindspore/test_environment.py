"""What MindSpore is told before it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.export_cache import CACHE_VARIABLE

ROOT = Path(__file__).parents[2]
FAILING = """
from visualglm.backends.mindspore.environment import prepare_mindspore
prepare_mindspore()
import mindspore as ms
def call(x):
    return ms.ops.matmul(x, ms.ops.ones((3, 3)))
ms.jit(call)(ms.Tensor([[1.0, 2.0]]))
"""


def test_a_graph_that_fails_leaves_nothing_in_the_folder_of_the_user(tmp_path: Path) -> None:
    own, cache = tmp_path / "own", tmp_path / "cache"
    own.mkdir()
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    environment = {CACHE_VARIABLE: str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=own, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "analyze_fail.ir" in done.stderr
    assert not list(own.iterdir())
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["analyze_fail.ir"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"GLOG_v": "1", "MS_OM_PATH": "elsewhere"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    prepare_mindspore()
    assert {name: os.environ[name] for name in chosen} == chosen
