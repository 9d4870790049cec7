"""`visualglm check` of MindIR exports that are not whole; no graph is run."""

from pathlib import Path

import pytest

from tests.checkpoint.test_mindir_dir import INC, write
from tests.cli.program import Invoke


@pytest.fixture
def mindir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """An export to spoil."""
    return write(tmp_path / "mindir", tiny_model_dir)


def test_a_missing_graph_is_to_be_exported_again(invoke: Invoke, mindir: Path):
    (mindir / INC / "rank_0_graph.mindir").unlink()
    outcome = invoke("check", mindir)
    assert outcome.code == 1 and "rank_0_graph.mindir is missing; export the model again." in outcome.out


def test_without_a_manifest(invoke: Invoke, mindir: Path):
    (mindir / "manifest.json").unlink()
    for command in (("check", mindir), ("ask", "--model", mindir, "?")):
        assert "holds the graphs of an export without its manifest.json" in invoke(*command).error


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "visualglm-mindir"}', '{"format": "other"}'])
def test_a_manifest_that_is_none(content: str, invoke: Invoke, mindir: Path):
    (mindir / "manifest.json").write_text(content)
    outcome = invoke("check", mindir)
    assert outcome.code == 1 and outcome.out.startswith("✗  manifest.json"), outcome
    assert "safetensors" not in outcome.out
