import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from visualglm.checkpoint import shards
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.convert import Format, convert
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory, verify
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.sat import write_sat
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError, TokenizerError
from visualglm.parameters import parameter_count, parameter_shapes

WEIGHTS = {"sat": "1/mp_rank_00_model_states.pt", "hf": "pytorch_model.bin"}
CONFIGS = {"sat": "model_config.json", "hf": "config.json"}
FOREIGN: tuple[Format, ...] = ("sat", "hf")
SOURCES: list[tuple[str, Format]] = [("a_image_b1", "sat"), ("c_text_only", "sat"), ("a_hf_layout", "hf")]
ROTARY = "mixins.chatglm-attn.rotary_emb.inv_freq"
STRAY = "transformer.position_embeddings.weight"
State = dict[str, torch.Tensor]


def load(folder: Path, form: str) -> State:
    loaded: Any = torch.load(folder / WEIGHTS[form], weights_only=True)
    state: State = loaded["module"] if form == "sat" else loaded
    return state


def save(state: State, folder: Path, form: str) -> None:
    torch.save({"module": state} if form == "sat" else state, folder / WEIGHTS[form])


def assert_same_bits(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()


def assert_same_tensors(one: ModelDirectory, other: ModelDirectory) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.config == other.config
    for name, tensor in one.tensors.items():
        assert tensor.array().tobytes() == other.tensors[name].array().tobytes()


@pytest.mark.parametrize(("name", "form"), SOURCES)
def test_there_and_back_is_the_same_bit_by_bit(name: str, form: Format, goldens: Path, tmp_path: Path) -> None:
    there = convert(goldens / name, tmp_path / "model")
    back = convert(tmp_path / "model", tmp_path / "back", to=form)
    assert (there.source_format, there.output_format) == (form, "model")
    assert (back.source_format, back.output_format) == ("model", form)
    assert there.dropped == back.dropped == ()
    assert there.layout == {"sat": "thirds", "hf": "per_head"}[form]
    assert there.dtype == "float16"
    assert there.parameter_count == parameter_count(open_model_directory(tmp_path / "model").config)
    assert_same_bits(load(tmp_path / "back", form), load(goldens / name, form))
    assert json.loads((tmp_path / "back" / CONFIGS[form]).read_text()) == json.loads(
        (goldens / name / CONFIGS[form]).read_text()
    )
    if form == "sat":
        assert (tmp_path / "back" / "latest").read_bytes() == (goldens / name / "latest").read_bytes()
    verify(tmp_path / "model")


def test_both_formats_of_one_model_make_the_same_directory(goldens: Path, tmp_path: Path) -> None:
    convert(goldens / "a_image_b1", tmp_path / "from_sat")
    convert(goldens / "a_hf_layout", tmp_path / "from_hf")
    assert_same_tensors(open_model_directory(tmp_path / "from_sat"), open_model_directory(tmp_path / "from_hf"))


@pytest.mark.parametrize("by_way_of_a_model", [True, False])
def test_from_one_foreign_format_to_the_other(by_way_of_a_model: bool, goldens: Path, tmp_path: Path) -> None:
    ways: list[tuple[str, Format, str]] = [("a_image_b1", "hf", "a_hf_layout"), ("a_hf_layout", "sat", "a_image_b1")]
    for source, to, expected in ways:
        folder = goldens / source
        if by_way_of_a_model:
            folder = convert(folder, tmp_path / f"{source}.model").output
        convert(folder, tmp_path / to, to=to)
        assert_same_bits(load(tmp_path / to, to), load(goldens / expected, to))
    convert(tmp_path / "hf", tmp_path / "again")
    convert(goldens / "a_image_b1", tmp_path / "direct")
    assert_same_tensors(open_model_directory(tmp_path / "again"), open_model_directory(tmp_path / "direct"))


def test_what_hugging_face_has_no_place_for_is_told(goldens: Path, tmp_path: Path) -> None:
    assert convert(goldens / "c_text_only", tmp_path / "hf", to="hf").dropped == (STRAY,)
    state = load(tmp_path / "hf", "hf")
    assert STRAY not in state
    rotary = [name for name in state if "inv_freq" in name]
    assert rotary == [f"transformer.layers.{layer}.attention.rotary_emb.inv_freq" for layer in (0, 1)]
    assert all(torch.equal(state[name], load(goldens / "c_text_only", "sat")[ROTARY]) for name in rotary)


def test_a_model_of_our_own_gets_all_that_others_need(tiny_model_dir: Path, tmp_path: Path) -> None:
    for form in FOREIGN:
        made = convert(tiny_model_dir, tmp_path / form, to=form)
        assert made.has_tokenizer
        assert (tmp_path / form / "ice_text.model").is_file()
        rotary = [tensor for name, tensor in load(tmp_path / form, form).items() if "inv_freq" in name]
        assert len(rotary) == {"sat": 1, "hf": 2}[form]
        assert rotary[0].dtype == torch.float16
        convert(tmp_path / form, tmp_path / f"{form}.model")
        again = open_model_directory(tmp_path / f"{form}.model")
        assert_same_tensors(again, open_model_directory(tiny_model_dir))
        assert again.tokenizer_path is not None


def test_an_old_sat_archive_packs_by_heads(sat_archive: Path, goldens: Path, tmp_path: Path) -> None:
    state = load(sat_archive, "sat")
    for name, tensor in load(goldens / "a_hf_layout", "hf").items():
        if name.startswith("transformer.layers.") and "query_key_value" in name:
            state[name] = tensor
    save(state, sat_archive, "sat")
    values = json.loads((sat_archive / "model_config.json").read_text())
    del values["pad_token_id"]
    (sat_archive / "model_config.json").write_text(json.dumps(values))
    assert convert(sat_archive, tmp_path / "model").layout == "per_head"
    convert(goldens / "a_image_b1", tmp_path / "new")
    assert_same_tensors(open_model_directory(tmp_path / "model"), open_model_directory(tmp_path / "new"))
    convert(tmp_path / "model", tmp_path / "back", to="sat")
    assert_same_bits(load(tmp_path / "back", "sat"), state)
    assert json.loads((tmp_path / "back" / "model_config.json").read_text()) == values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_and_mixed_types_are_kept(dtype: torch.dtype, hf_folder: Path, tmp_path: Path) -> None:
    state = {
        name: tensor if "layernorm" in name else tensor.to(dtype) for name, tensor in load(hf_folder, "hf").items()
    }
    save(state, hf_folder, "hf")
    assert f"torch.{convert(hf_folder, tmp_path / 'model').dtype}" == str(dtype)
    assert open_model_directory(tmp_path / "model").tensors["text.norm.weight"].dtype == "float16"
    convert(tmp_path / "model", tmp_path / "back", to="hf")
    found = load(tmp_path / "back", "hf")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())


def test_tensors_that_are_views_are_written_in_order(sat_archive: Path, tmp_path: Path) -> None:
    state = load(sat_archive, "sat")
    turned = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    save(turned, sat_archive, "sat")
    for to in FOREIGN:
        convert(sat_archive, tmp_path / f"to_{to}", to=to)
        convert(tmp_path / f"to_{to}", tmp_path / f"{to}.sat", to="sat")
        assert_same_bits(load(tmp_path / f"{to}.sat", "sat"), state)


@pytest.fixture(params=["bin", "safetensors"])
def sharded(request: pytest.FixtureRequest, hf_folder: Path) -> Path:
    """A Hugging Face checkpoint in four files."""
    state = {name: tensor.clone() for name, tensor in load(hf_folder, "hf").items()}
    (hf_folder / WEIGHTS["hf"]).unlink()
    writers: dict[str, tuple[str, Callable[[State, Path], None]]]
    writers = {"bin": ("pytorch_model", torch.save), "safetensors": ("model", save_file)}
    stem, write = writers[request.param]
    names = [f"{stem}-{part:05d}-of-00004.{request.param}" for part in range(1, 5)]
    for part, name in enumerate(names):
        write({key: state[key] for key in list(state)[part::4]}, hf_folder / name)
    weight_map = {key: names[position % 4] for position, key in enumerate(state)}
    (hf_folder / f"{stem}.{request.param}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return hf_folder


def test_several_files(sharded: Path, goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 200_000)
    convert(sharded, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "back", to="hf")
    index = json.loads((tmp_path / "back" / "pytorch_model.bin.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"pytorch_model-00001-of-{len(files):05d}.bin" and len(files) > 3
    found: State = {}
    for name in files:
        found |= torch.load(tmp_path / "back" / name, weights_only=True)
    expected = load(goldens / "a_hf_layout", "hf")
    assert_same_bits(found, expected)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_missing_files_are_all_named(sharded: Path, tmp_path: Path) -> None:
    files = sorted(path for path in sharded.iterdir() if "-of-" in path.name)
    for path in files[1:3]:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 2 of the 4 files named in .*: {files[1].name}, {files[2].name};"):
        convert(sharded, tmp_path / "out")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../../etc/passwd"}, r"names a file outside its folder, \.\./\.\./etc/passwd"),
        ({"a": 3}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_is_not_valid(weight_map: Any, message: str, hf_folder: Path, tmp_path: Path) -> None:
    (hf_folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        convert(hf_folder, tmp_path / "out")


def test_misfits_are_listed_by_their_foreign_names(
    sat_archive: Path, tmp_path: Path, entries: Callable[[Path], list[str]]
) -> None:
    state = load(sat_archive, "sat")
    del state["transformer.final_layernorm.bias"]
    state["transformer.layers.0.attention.query_key_value.spare"] = torch.zeros(2, 2)
    state["mixins.eva.model.glm_proj.weight"] = torch.zeros(2, 2).half()
    state["evil\x1b[2J"] = torch.zeros(1)
    save(state, sat_archive, "sat")
    with pytest.raises(CheckpointError) as caught:
        convert(sat_archive, tmp_path / "out")
    assert str(caught.value) == (
        f"The tensors in {sat_archive} do not fit its configuration: 1 missing (transformer.final_layernorm.bias); "
        r"2 unexpected (transformer.layers.0.attention.query_key_value.spare, 'evil\x1b[2J'); "
        "1 of another shape (mixins.eva.model.glm_proj.weight is [2, 2] instead of [64, 48])."
    )
    assert entries(tmp_path) == ["sat"]


def test_other_rotary_frequencies_are_refused(hf_folder: Path, tmp_path: Path) -> None:
    state = load(hf_folder, "hf")
    name = "transformer.layers.2.attention.rotary_emb.inv_freq"
    state[name] = state[name] * 2
    save(state, hf_folder, "hf")
    with pytest.raises(CheckpointError, match=f"{name} does not hold the rotary frequencies"):
        convert(hf_folder, tmp_path / "out")


def test_rotary_frequencies_need_not_be_stored(sat_archive: Path, tmp_path: Path) -> None:
    state = load(sat_archive, "sat")
    del state[ROTARY]
    save(state, sat_archive, "sat")
    convert(sat_archive, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "back", to="sat")
    assert_same_bits(load(tmp_path / "back", "sat"), state)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "model_config.json",
            r"sat is no checkpoint: none of manifest\.json \(a model directory\), "
            r"model_config\.json \(a SAT archive\), config\.json \(a Hugging Face checkpoint\), "
            r"glm_6b\.ckpt \(the files of MindFormers\) is there",
        ),
        ("latest", "latest, which names the folder of the weights, is missing"),
        (WEIGHTS["sat"], "mp_rank_00_model_states.pt is missing"),
    ],
)
def test_incomplete_sat_archives(missing: str, message: str, sat_archive: Path, tmp_path: Path) -> None:
    (sat_archive / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        convert(sat_archive, tmp_path / "out")


def test_spoiled_sat_archives(sat_archive: Path, tmp_path: Path) -> None:
    (sat_archive / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="latest names a folder outside the archive"):
        convert(sat_archive, tmp_path / "out")
    (sat_archive / "latest").write_text("1\n")
    (sat_archive / WEIGHTS["sat"]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is only a git-lfs pointer"):
        convert(sat_archive, tmp_path / "out")
    torch.save({"weights": {}}, sat_archive / WEIGHTS["sat"])
    with pytest.raises(CheckpointError, match="has no dictionary 'module' of tensors"):
        convert(sat_archive, tmp_path / "out")


def test_incomplete_hf_checkpoints(hf_folder: Path, tmp_path: Path) -> None:
    (hf_folder / WEIGHTS["hf"]).unlink()
    with pytest.raises(CheckpointError, match=r"hf has no weights: none of model\.safetensors, .* is there"):
        convert(hf_folder, tmp_path / "out")
    (hf_folder / "config.json").write_text('{"model_type": "llama"}')
    (hf_folder / WEIGHTS["hf"]).touch()
    with pytest.raises(CheckpointError, match="no torch checkpoint"):
        convert(hf_folder, tmp_path / "out")
    torch.save({}, hf_folder / WEIGHTS["hf"])
    with pytest.raises(CheckpointError, match="so it is not of VisualGLM"):
        convert(hf_folder, tmp_path / "out")


def test_quantised_checkpoints_are_refused(hf_folder: Path, tmp_path: Path) -> None:
    state = load(hf_folder, "hf")
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    save(state, hf_folder, "hf")
    with pytest.raises(CheckpointError, match=r"1 not float32, float16, bfloat16 \(lm_head\.weight is int8\)"):
        convert(hf_folder, tmp_path / "out")


def test_paths_and_formats_that_cannot_be(sat_archive: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file of weights; give the folder"):
        convert(sat_archive / WEIGHTS["sat"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="'onnx' is unknown; give one of model, sat, hf"):
        convert(sat_archive, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    for output in (sat_archive, tmp_path):
        with pytest.raises(CheckpointError, match="holds the checkpoint that is to be converted"):
            convert(sat_archive, output, force=True)


def test_an_output_is_replaced_with_force_only(sat_archive: Path, goldens: Path, tmp_path: Path) -> None:
    convert(goldens / "c_text_only", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(sat_archive, tmp_path / "out")
    convert(sat_archive, tmp_path / "out", force=True)
    assert open_model_directory(tmp_path / "out").config.text.num_hidden_layers == 4
    convert(sat_archive, tmp_path / "out", to="sat", force=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_licence_of_the_weights_goes_with_them(model_dir: Path, sat_archive: Path, tmp_path: Path) -> None:
    made = convert(sat_archive, tmp_path / "again")
    assert made.license_text is not None and "research only" in made.license_text
    for folder in (
        model_dir,
        convert(model_dir, tmp_path / "copy").output,
        convert(model_dir, tmp_path / "s", to="sat").output,
    ):
        assert (folder / "WEIGHTS_LICENSE.txt").read_text() == made.license_text


@pytest.mark.parametrize("to", ["sat", "hf"])
def test_the_licence_of_other_weights_comes_back_with_them(tiny_model_dir: Path, to: Format, tmp_path: Path) -> None:
    there = convert(tiny_model_dir, tmp_path / "there", to=to)
    back = convert(there.output, tmp_path / "back")
    assert there.license_text == back.license_text == "Free to use.\n"


def test_a_model_directory_is_copied_with_all_it_holds(model_dir: Path, tmp_path: Path) -> None:
    convert(model_dir, tmp_path / "copy")
    names = sorted(path.name for path in model_dir.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert all((model_dir / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in names)


def test_the_tokenizer(tiny_model_dir: Path, tiny_tokenizer_path: Path, sat_archive: Path, tmp_path: Path) -> None:
    source = convert(tiny_model_dir, tmp_path / "tiny", to="sat").output
    (source / "ice_text.model").unlink()
    assert not convert(source, tmp_path / "without").has_tokenizer
    made = convert(source, tmp_path / "with", tokenizer=tiny_tokenizer_path)
    assert made.has_tokenizer
    assert (tmp_path / "with" / "tokenizer.model").read_bytes() == tiny_tokenizer_path.read_bytes()
    shutil.copy(tiny_tokenizer_path, source / "ice_text.model")
    assert convert(source, tmp_path / "found").has_tokenizer
    with pytest.raises(TokenizerError, match="does not fit this model"):
        convert(sat_archive, tmp_path / "out", tokenizer=tiny_tokenizer_path)
    (source / "ice_text.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"The tokenizer .*ice_text\.model is a git-lfs pointer"):
        convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "given", tokenizer=tiny_tokenizer_path).has_tokenizer
    for name, words in (("nothing", "nothing does not exist; put the"), ("with", "with is a folder")):
        with pytest.raises(TokenizerError, match=f"The tokenizer .*{words}"):
            convert(source, tmp_path / "out", tokenizer=tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be used"):
        convert(source, "a\0b")
    assert not (tmp_path / "out").exists()


KILLED = """
    import os, signal, sys
    from visualglm.checkpoint.convert import convert
    def report(done, total):
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3], report=report)
"""


@pytest.mark.parametrize("to", ["model", "sat", "hf"])
def test_a_killed_conversion_leaves_no_output(
    to: Format, goldens: Path, tmp_path: Path, entries: Callable[[Path], list[str]]
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(goldens / "a_image_b1"), str(tmp_path / "out"), to]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert entries(tmp_path) == [".out.partial"]
    convert(goldens / "a_image_b1", tmp_path / "out", to=to)
    assert entries(tmp_path) == ["out"]


MEASURED = """
    import sys
    from pathlib import Path
    from visualglm.checkpoint.convert import convert
    convert(sys.argv[1], sys.argv[2])
    convert(sys.argv[2], sys.argv[3], to="hf")
    print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_peak_of_memory_does_not_grow_with_the_model(tiny_config: VisualGLMConfig, tmp_path: Path) -> None:
    text = tiny_config.text.model_copy(update={"vocab_size": 100_000, "hidden_size": 768, "intermediate_size": 4096})
    config = tiny_config.model_copy(update={"text": text})
    tensors = {
        name: LazyTensor("float16", shape, partial(np.ones, shape, np.float16))
        for name, shape in parameter_shapes(config).items()
    }
    checkpoint = Checkpoint(config, tensors, Source(format="test"))
    assert checkpoint.size_bytes > 300 << 20
    (tmp_path / "sat").mkdir()
    write_sat(tmp_path / "sat", checkpoint, ByteProgress(1))
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(MEASURED),
        *(str(tmp_path / name) for name in ("sat", "model", "hf")),
    ]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert int(done.stdout.split()[1]) < 150 << 10


def test_nothing_imports_torch(goldens: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from visualglm.checkpoint.convert import convert; "
        f"convert({str(goldens / 'a_hf_layout')!r}, {str(tmp_path / 'sat')!r}, to='sat'); "
        "print(sorted({'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"


def test_an_archive_whose_latest_is_empty(sat_archive: Path, tmp_path: Path) -> None:
    (sat_archive / "latest").write_text("\n")
    with pytest.raises(CheckpointError, match="latest is empty and should name the weights' folder"):
        convert(sat_archive, tmp_path / "out")
