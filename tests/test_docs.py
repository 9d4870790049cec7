"""The programs in the guide run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.adapters import write_random_adapter
from visualglm.loading import builtin_path

ROOT = Path(__file__).parent.parent


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_graphs_answer_without_this_package():
    program, in_place = python_blocks("export.md")
    assert "visualglm" not in program.replace("visualglm/assets", "")
    whole = program.replace('"past": 0', '"past": len(prompt) + 64').replace(
        "answer: list", f"{in_place}\nanswer: list"
    )
    whole = whole.replace("found = dict(zip(outputs, decoder.run(outputs, {**inputs, **cache}), strict=True))", "")
    whole = whole.replace('found["logits"]', "run(inputs)")
    whole = "\n".join(line for line in whole.splitlines() if "for name in cache}" not in line)
    for code in (program, whole):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "一个小的红色圆形,一个小的粉色三角形,一个大的绿色菱形和文字STOP。\n"


def test_adapters_in_python(tmp_path: Path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs" / "colours").mkdir(parents=True)
    write_random_adapter(tmp_path / "runs" / "colours" / "adapter", builtin_path())
    first, second = python_blocks("adapters.md")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VISUALGLM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", f"{first}\n{second}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    merged, alone, beside = done.stdout.splitlines()
    assert alone == "None pink" and beside == f"colours {merged}" and merged != "pink"
