"""MindIR exports: reloaded they give the ids of the model, with a KV cache and without; and what is bad is told."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from mindspore.train import mind_ir_pb2
from numpy.typing import NDArray

import visualglm
from tests.cli.program import Outcome, finish, spawn
from tests.mindspore.greedy import answer_ids, asked_about, scene_images
from tests.ragged import STARTS, layout_of, random_pixels, random_rows
from visualglm.backends.base import Backend
from visualglm.backends.mindir.load import load_mindir_backend
from visualglm.checkpoint.mindir_dir import MindirDirectory, open_mindir_directory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError, DeviceError, PromptError
from visualglm.export.mindir import MindirOptions, export_mindir
from visualglm.generation.config import GenerationConfig
from visualglm.generation.decoding import generate_ids
from visualglm.loading import builtin_export, builtin_path
from visualglm.processing.layout import Layout

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
QUESTION = "图里有什么？"
ROWS, LENGTH = 3, 48
CACHE = {"use_past": True, "no_past": False}


def run(*arguments: object) -> Outcome:
    return finish(spawn(*arguments))


@pytest.fixture(scope="module")
def export_random(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MindirDirectory]:
    """Exports the random model with a KV cache or without, once."""
    made: dict[str, MindirDirectory] = {}

    def export(cache: str) -> MindirDirectory:
        if cache not in made:
            options = MindirOptions(seq_length=LENGTH, batch_size=ROWS, use_past=CACHE[cache])
            folder = tmp_path_factory.mktemp("mindir") / cache
            made[cache] = export_mindir(open_model_directory(tiny_model_dir), folder, options)
        return made[cache]

    return export


@pytest.fixture(scope="module", params=CACHE)
def exported(request: pytest.FixtureRequest, export_random: Callable[[str], MindirDirectory]) -> MindirDirectory:
    return export_random(request.param)


@pytest.fixture(scope="module")
def backend(exported: MindirDirectory) -> Backend:
    return load_mindir_backend(exported, "cpu")


@pytest.fixture(scope="module")
def torch_backend(tiny_model_dir: Path) -> Backend:
    return visualglm.load(tiny_model_dir, backend="torch", device="cpu").backend


@pytest.fixture(scope="module")
def pixels(tiny_config: VisualGLMConfig) -> NDArray[np.float32]:
    return random_pixels(tiny_config)


@pytest.fixture(scope="module")
def layout(tiny_config: VisualGLMConfig) -> Layout:
    return layout_of(tiny_config, random_rows(tiny_config)[:ROWS], STARTS[:ROWS])


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, exported by the command."""
    folder = tmp_path_factory.mktemp("builtin") / "mindir"
    outcome = run("export", builtin_path(), folder, "--format", "mindir", "--seq-length", 128, "--batch-size", 2)
    assert outcome.code == 0 and "2 rows of 128 tokens, with a KV cache, made by MindSpore 2.10" in outcome.out, outcome
    return folder


def test_files_are_named_as_the_recipe_names_them(exported: MindirDirectory):
    graphs = {name for name in exported.manifest.files if name.endswith(".mindir")}
    expected = {"mindir_vision_encoder/rank_0_graph.mindir", "mindir_full_checkpoint_bs_3_48/rank_0_graph.mindir"}
    if exported.manifest.use_past:
        expected.add("mindir_inc_checkpoint_bs_3_48/rank_0_graph.mindir")
    assert graphs == expected
    assert {*exported.manifest.files} - graphs == {"config.json", "tokenizer.model", "WEIGHTS_LICENSE.txt"}
    assert all((exported.path / name).stat().st_mode & 0o044 for name in graphs)


def test_logits_and_ids_are_those_of_torch(backend: Backend, torch_backend: Backend, layout: Layout, pixels):
    found, expected = (each.logits(layout, each.encode_images(pixels)) for each in (backend, torch_backend))
    text = np.arange(layout.sequence_length) >= layout.pad_lengths[:, None]
    np.testing.assert_allclose(found[text], expected[text], rtol=0, atol=5e-6 * np.abs(expected).max())
    for rows in ([0, 1, 2], [2, 1], [1]):
        kept = layout.keep_rows(np.array(rows))
        images = pixels[[STARTS[:row].count(1) for row in rows if STARTS[row] is not None]]
        config = GenerationConfig(max_new_tokens=20)
        found, expected = (
            generate_ids(each, kept, each.encode_images(images) if len(images) else [], config)
            for each in (backend, torch_backend)
        )
        assert found == expected


def test_rows_that_end_leave_the_others_as_they_were(backend: Backend, torch_backend: Backend, layout: Layout, pixels):
    tokens, kept = np.array([30, 31, 32]), np.array([0, 2])
    found = []
    for each in (backend, torch_backend):
        logits, cache = each.prefill(layout, each.encode_images(pixels), LENGTH)
        steps = [logits, each.step(tokens, layout, cache)]
        cache.keep_rows(kept)
        steps.append(each.step(tokens[kept] + 1, layout.keep_rows(kept), cache))
        found.append(np.concatenate(steps))
    np.testing.assert_allclose(*found, rtol=0, atol=5e-6 * np.abs(found[1]).max())


def test_the_text_may_fill_the_export_to_its_last_column(backend: Backend, torch_backend: Backend, layout: Layout):
    alone, tokens = layout.keep_rows(np.array([1])), np.array([40])
    last = []
    for each in (torch_backend, backend):
        _, cache = each.prefill(alone, [], LENGTH)
        for _ in range(LENGTH - layout.sequence_length):
            logits = each.step(tokens, alone, cache)
        last.append(logits)
    np.testing.assert_allclose(*last, rtol=0, atol=5e-6 * np.abs(last[0]).max())
    with pytest.raises(PromptError, match=r"take 49 tokens, but the export was made for 48; .* --seq-length\.$"):
        backend.step(tokens, alone, cache)


def test_half_precision_agrees_loosely(tiny_model_dir: Path, torch_backend: Backend, layout, pixels, tmp_path: Path):
    options = MindirOptions("fp16", seq_length=LENGTH, batch_size=ROWS)
    done = export_mindir(open_model_directory(tiny_model_dir), tmp_path / "half", options)
    half = load_mindir_backend(done)
    found, expected = (each.prefill(layout, each.encode_images(pixels), LENGTH)[0] for each in (half, torch_backend))
    assert found.dtype == np.float32 and "fp16" in half.description
    assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.01


def test_weights_that_mindspore_puts_aside(
    tiny_model_dir: Path, torch_backend: Backend, layout, pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As it does above 1 GiB."""
    monkeypatch.setattr("mindspore.train.serialization.TOTAL_SAVE", 10)
    options = MindirOptions(seq_length=LENGTH, batch_size=ROWS)
    done = export_mindir(open_model_directory(tiny_model_dir), tmp_path / "split", options)
    assert f"{done.manifest.folder('inc')}/rank_0_variables/data_0" in done.manifest.files
    config = GenerationConfig(max_new_tokens=8)
    moved = done.path.rename(tmp_path / "moved")
    backends = load_mindir_backend(open_mindir_directory(moved)), torch_backend
    found, expected = (generate_ids(each, layout, each.encode_images(pixels), config) for each in backends)
    assert found == expected
    data = moved / done.manifest.folder("full") / "rank_0_variables" / "data_0"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"is damaged: .*data_0 changed since it was written; export the model"):
        open_mindir_directory(moved)


def test_the_commands_answer_in_fresh_processes(builtin: Path, tmp_path: Path):
    expected = visualglm.load(backend="torch", device="cpu").ask(EXAMPLES / "stop.png", QUESTION)
    for chosen in ((), ("--backend", "mindir", "--device", "cpu")):
        outcome = run("ask", "--model", builtin, *chosen, "-i", EXAMPLES / "stop.png", QUESTION)
        assert (outcome.code, outcome.out) == (0, f"{expected}\n"), outcome.err
        assert "mindir on cpu, fp32, 2 × 128" in outcome.err
    with spawn("chat", "-q", "--model", builtin, "--image", EXAMPLES / "stop.png") as process:
        assert expected in finish(process, f"{QUESTION}\n").out
    rows = tmp_path / "rows.jsonl"
    row = {"image": str(EXAMPLES / "stop.png"), "prompt": QUESTION, "label": expected}
    rows.write_text(f"{json.dumps(row)}\n" * 3, "utf-8")
    outcome = run("caption", "-q", "--model", builtin, "--batch-size", 2, rows, "-o", tmp_path / "captions.jsonl")
    assert outcome.code == 0, outcome
    answers = [json.loads(line)["answer"] for line in (tmp_path / "captions.jsonl").read_text("utf-8").splitlines()]
    assert answers == [expected] * 3
    outcome = run("caption", "-q", "--model", builtin, rows, "-o", tmp_path / "more.jsonl")
    assert "3 rows are to be answered at once, but the export was made for 2; give --batch-size 2" in outcome.error


@pytest.mark.parametrize(("cache", "scenes"), [("use_past", 40), ("no_past", 9)])
def test_greedy_ids_are_those_of_torch(cache: str, scenes: int, tmp_path: Path):
    check(cache, tmp_path, scenes)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHE)
def test_greedy_ids_are_those_of_torch_over_500_scenes(cache: str, tmp_path: Path):
    check(cache, tmp_path, 500)


def check(cache: str, folder: Path, scenes: int) -> None:
    """An export just long enough: without a cache every token takes as long as all of its columns."""
    asked, rows = asked_about(scenes), 64
    length = max(len(each.prompt.input_ids) for each in asked) + max(each.room for each in asked)
    options = MindirOptions(seq_length=length, batch_size=rows, use_past=CACHE[cache])
    export_mindir(open_model_directory(builtin_path()), folder / "mindir", options)
    model = visualglm.load(folder / "mindir")
    assert answer_ids(model, asked, scene_images(model, scenes), rows) == [each.answer for each in asked]


def test_evaluate_and_bench(builtin: Path, tmp_path: Path):
    expected = visualglm.load(backend="torch", device="cpu").ask(EXAMPLES / "stop.png", QUESTION)
    rows = tmp_path / "rows.jsonl"
    row = {"image": str(EXAMPLES / "stop.png"), "prompt": QUESTION, "label": expected}
    rows.write_text(json.dumps(row) + "\n", "utf-8")
    results = []
    for name, chosen in (("mindir", ("--model", builtin)), ("torch", ("--backend", "torch"))):
        outcome = run("evaluate", "-q", *chosen, rows, "--output", tmp_path / name)
        assert outcome.code == 0, outcome
        results.append(json.loads((tmp_path / name).read_text("utf-8").splitlines()[0]))
    assert results[0]["answer"] == results[1]["answer"] == expected
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    assert "runs in one shape only, and the benchmark has several; measure" in run("bench", "-q", builtin).error


def test_check_and_info(builtin: Path, tmp_path: Path):
    outcome = run("check", "-q", builtin)
    assert outcome.code == 0 and "MindIR export, fp32, 2 rows of 128 tokens" in outcome.out, outcome
    assert "MindIR export" in run("info", builtin).out
    damaged = copytree(builtin, tmp_path / "damaged")
    graph = damaged / "mindir_full_checkpoint_bs_2_128" / "rank_0_graph.mindir"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    outcome = run("check", "-q", damaged)
    assert outcome.code == 1 and "changed since it was written" in outcome.out


def test_a_damaged_or_half_written_graph_is_told(builtin: Path, tmp_path: Path):
    damaged = copytree(builtin, tmp_path / "damaged")
    graph = damaged / "mindir_inc_checkpoint_bs_2_128" / "rank_0_graph.mindir"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    ask = ("ask", "-q", "--model", damaged, QUESTION)
    assert "rank_0_graph.mindir has" in run(*ask).error and "it was cut short or changed; export" in run(*ask).error
    graph.write_bytes(b"x" * len(whole))
    assert "is damaged: mindir_inc_checkpoint_bs_2_128/rank_0_graph.mindir changed since" in run(*ask).error
    graph.unlink()
    assert "lacks mindir_inc_checkpoint_bs_2_128/rank_0_graph.mindir; export the model again." in run(*ask).error


def test_a_graph_that_mindspore_cannot_read(export_random, tmp_path: Path):
    """One too large to be hashed at every start."""
    damaged = open_mindir_directory(copytree(export_random("use_past").path, tmp_path / "damaged"))
    damaged.graph("full").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"rank_0_graph\.mindir is no MindIR graph that can be used .*; export"):
        load_mindir_backend(damaged)
    damaged.graph("full").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"rank_0_graph\.mindir is no MindIR graph that can be used .*; export"):
        load_mindir_backend(damaged)
    # A version that says nothing, and no graph.
    damaged.graph("full").write_bytes(b"\x0a\x01x")
    with pytest.raises(CheckpointError, match=r"rank_0_graph\.mindir cannot be loaded by MindSpore 2\.10.*; export"):
        load_mindir_backend(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda it: setattr(it.primitives[5], "op_type", "PyExecute"),
            "has the operator PyExecute, which no",
        ),
        (
            lambda it: setattr(it.graph.node[3], "op_type", "REF::PyExecute"),
            "has the operator REF::PyExecute,",
        ),
        (lambda it: it.preprocessor.op.add(), "has a preprocessor, which no export of ours has"),
        (lambda it: it.graph.map_parameter.add(), "has parameters of a kind that no export"),
        (
            lambda it: setattr(it.graph.parameter[0].external_data, "location", "../../../secret"),
            r"asks for weights in \.\./\.\./\.\./secret, which is no file of the export",
        ),
        (
            lambda it: it.graph.parameter[0].external_data.MergeFrom(
                type(it.graph.parameter[0].external_data)(location="rank_0_graph.mindir", offset=9, length=10**9)
            ),
            r"asks for weights beyond the end of rank_0_graph\.mindir",
        ),
    ],
)
def test_a_graph_that_would_do_more_than_compute(change, message, export_random, tmp_path: Path):
    hostile = open_mindir_directory(copytree(export_random("use_past").path, tmp_path / "hostile"))
    graph = mind_ir_pb2.ModelProto()
    graph.ParseFromString(hostile.graph("inc").read_bytes())
    change(graph)
    hostile.graph("inc").write_bytes(graph.SerializePartialToString())
    with pytest.raises(CheckpointError, match=rf"mindir {message}.*; do not use it, or export the model again\.$"):
        load_mindir_backend(hostile)


def test_too_long_and_too_many(export_random, layout: Layout, pixels):
    backend = load_mindir_backend(export_random("use_past"))
    with pytest.raises(PromptError, match=r"and max_new_tokens 40 exceed the model's window of 48 tokens; shorten"):
        generate_ids(backend, layout, backend.encode_images(pixels), GenerationConfig(max_new_tokens=40))
    with pytest.raises(PromptError, match=r"take 49 tokens, but the export was made for 48; shorten them, or export"):
        backend.prefill(layout, backend.encode_images(pixels), 49)
    more = layout.keep_rows(np.array([1, 1, 1, 1]))
    with pytest.raises(PromptError, match=r"^4 rows are .* made for 3; give --batch-size 3, or export .* 4\.$"):
        backend.prefill(more, [], LENGTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": 5}, r"The length 5 cannot be exported: .*; give --seq-length 6 … \d+\."),
        ({"seq_length": 100_000}, r"The length 100,000 cannot be exported: .* window is \d+; give --seq-length 6"),
    ],
)
def test_lengths_that_the_model_does_not_have(options, message, tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        export_mindir(open_model_directory(tiny_model_dir), tmp_path / "out", MindirOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "mindir", "--precision", "int4"), "MindIR exports have no int4; give --precision fp32, or fp16"),
        (("--format", "mindir", "--method", "rtn"), "--method is for --format onnx, and the format is mindir; leave"),
        (("--seq-length", 64), "--seq-length is for --format mindir, and the format is onnx; leave it out."),
    ],
)
def test_options_of_the_other_format(options, message, tmp_path: Path):
    assert message in run("export", builtin_path(), tmp_path / "out", *options).error


def test_exports_and_backends_that_do_not_fit(export_random):
    path = export_random("use_past").path
    for backend in ("onnx", "torch", "mindspore"):
        with pytest.raises(DeviceError, match=rf"is an export for MindSpore, which {backend} cannot run; give --backe"):
            visualglm.load(path, backend=backend)
    with pytest.raises(DeviceError, match=r"is an export for ONNX Runtime, which mindir cannot run; give --backend on"):
        visualglm.load(builtin_export(), backend="mindir")
    with pytest.raises(DeviceError, match=r"runs exports only, and the built-in model is none; make one with `visualg"):
        visualglm.load(backend="mindir")
    with pytest.raises(DeviceError, match=r"is an export of precision fp32 and cannot be run as int8"):
        visualglm.load(path, dtype="int8")
    with pytest.raises(DeviceError, match=r"The device 'ascend:0' cannot be used by the installed MindSpore"):
        visualglm.load(path, device="ascend")
    with pytest.raises(CheckpointError, match=r"is a MindIR export, and a model directory is needed; give one made by"):
        open_model_directory(path)


def test_force_replaces_such_an_export_and_nothing_else(export_random, tiny_model_dir: Path, tmp_path: Path):
    model, options = open_model_directory(tiny_model_dir), MindirOptions(seq_length=LENGTH, use_past=False)
    old = copytree(export_random("use_past").path, tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"is not empty; give another folder, or --force"):
        export_mindir(model, old, options)
    own = old / "mindir_vision_encoder" / "notes.txt"
    own.write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds mindir_vision_encoder, which is no part of the MindIR export"):
        export_mindir(model, old, options, force=True)
    own.unlink()
    done = export_mindir(model, old, options, force=True)
    assert not list(done.path.glob("mindir_inc*")) and not list(tmp_path.glob(".old*"))
