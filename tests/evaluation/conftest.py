"""A data set of drawn scenes for the built-in model, which knows their answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.scene import make_scene

Write = Callable[..., Path]

DESCRIBE = "图里有什么？"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows as JSONL beside three pictures, a.png, b.png and c.png."""
    for number, name in enumerate("abc"):
        draw_scene(make_scene(HELD_OUT_SEEDS + number)).save(tmp_path / f"{name}.png")

    def write_rows(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write_rows
