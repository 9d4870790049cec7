"""Models in the three files of MindFormers: names and layouts spelled out, round trips, recipes beside them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.files import write_file
from visualglm.checkpoint.mindformers import read_mindformers
from visualglm.checkpoint.mindspore_ckpt import mindspore_pieces, read_mindspore
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.errors import CheckpointError, ConfigError

VIT, QFORMER, GLM, LITE = "visualglm_vit.ckpt", "visualglm_qformer.ckpt", "glm_6b.ckpt", "glm_6b_for_lite.ckpt"
OWN = "visualglm_config.json"
SAT_WEIGHTS = "1/mp_rank_00_model_states.pt"
Arrays = dict[str, NDArray[Any]]


def arrays(path: Path) -> Arrays:
    return {name: tensor.array() for name, tensor in read_mindspore(path).items()}


def write(path: Path, values: Arrays) -> None:
    path.unlink(missing_ok=True)
    tensors = {
        name: LazyTensor(array.dtype.name, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in values.items()
    }
    write_file(path, mindspore_pieces(tensors))


def change(path: Path, edit: Callable[[Arrays], object]) -> None:
    values = {name: np.array(array) for name, array in arrays(path).items()}
    edit(values)
    write(path, values)


@pytest.fixture
def trio(goldens: Path, tmp_path: Path) -> Path:
    """The three files of a golden model, to spoil; without their hashes, as the recipe makes them."""
    made = convert(goldens / "a_image_b1", tmp_path / "trio", to="mindformers").output
    (made / "SHA256SUMS").unlink()
    return made


def by_the_recipe(state: dict[str, torch.Tensor]) -> dict[str, Arrays]:
    """What the recipe's converter makes of a SAT archive, spelled out once more."""
    files: dict[str, Arrays] = {VIT: {}, QFORMER: {}, GLM: {}, LITE: {}}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.layers."))
    for name, tensor in state.items():
        array = tensor.numpy()
        if "ln_vision" in name:
            for file in (VIT, QFORMER):
                files[file]["ln_vision.gamma" if name.endswith("weight") else "ln_vision.beta"] = array
        elif "glm_proj" in name:
            files[QFORMER][name.replace("mixins.eva.model.glm_proj", "llm_proj")] = array
        elif ".vit." in name:
            files[VIT] |= vit_tensors(name, array)
        elif ".qformer." in name:
            files[QFORMER] |= qformer_tensors(name, array)
        elif "inv_freq" in name:
            for layer in range(layers):
                files[GLM][f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = array
        else:
            named = name.replace("mixins.chatglm-final.", "")
            if "embeddings" in name:
                named = named.replace("weight", "embedding_table")
                files[LITE][named] = array
            if "layernorm" in name:
                named = named.replace("weight", "gamma").replace("bias", "beta")
            files[GLM][named] = array
    return files


def vit_tensors(name: str, array: NDArray[Any]) -> Arrays:
    name = name.rpartition(".vit.")[2].removeprefix("transformer.").removeprefix("mixins.")
    kind = "gamma" if name.endswith("weight") else "beta"
    if name == "word_embeddings.weight":
        return {"visual_encoder.cls_tokens": array[None]}
    if name == "position_embeddings.weight":
        return {"visual_encoder.pos_embed": array[None]}
    if name.startswith("patch_embedding"):
        return {"visual_encoder." + name.replace("patch_embedding", "patch_embed"): array}
    _, layer, rest = name.split(".", 2)
    prefix = f"visual_encoder.blocks.{layer}."
    if "query_key_value" in rest:
        end = rest.rpartition(".")[2]
        return {f"{prefix}attention.dense{n + 1}.{end}": part for n, part in enumerate(np.split(array, 3))}
    if "layernorm" in rest:
        return {f"{prefix}{'layernorm1' if rest.startswith('input') else 'layernorm2'}.{kind}": array}
    for sat, theirs in {
        "attention.dense.": "attention.projection.",
        "mlp.dense_h_to_4h.": "output.mapping.",
        "mlp.dense_4h_to_h.": "output.projection.",
    }.items():
        rest = rest.replace(sat, theirs)
    return {prefix + rest: array.T if rest.endswith("weight") else array}


def qformer_tensors(name: str, array: NDArray[Any]) -> Arrays:
    name = name.rpartition(".qformer.transformer.")[2]
    kind = "gamma" if name.endswith("weight") else "beta"
    end = name.rpartition(".")[2]
    if name.startswith("word_embeddings"):
        return {"query_tokens": array[None]}
    if name.startswith("final_layernorm"):
        return {f"qformer.bert.encoder.final_layernorm.{kind}": array}
    _, layer, rest = name.split(".", 2)
    prefix = f"qformer.bert.encoder.layer.{layer}."
    for sat, theirs in {
        "attention.query_key_value": "attention",
        "cross_attention.key_value": "crossattention",
    }.items():
        if rest.startswith(sat):
            parts = ("query", "key", "value")[-3 if theirs == "attention" else -2 :]
            split = np.split(array, len(parts))
            return {f"{prefix}{theirs}.self_att.{part}.{end}": one for part, one in zip(parts, split, strict=True)}
    modules = {
        "input_layernorm": f"input_layernorm.{kind}",
        "post_attention_layernorm": f"attention.output.layernorm.{kind}",
        "post_cross_attention_layernorm": f"crossattention.output.layernorm.{kind}",
        "attention.dense": f"attention.output.dense.{end}",
        "cross_attention.dense": f"crossattention.output.dense.{end}",
        "cross_attention.query": f"crossattention.self_att.query.{end}",
        "mlp.dense_h_to_4h": f"intermediate_query.dense.{end}",
        "mlp.dense_4h_to_h": f"output_query.dense.{end}",
    }
    return {prefix + modules[rest.rpartition(".")[0]]: array}


@pytest.mark.parametrize("name", ["a_image_b1", "c_text_only"])
def test_the_files_are_those_of_the_recipe(name: str, goldens: Path, tmp_path: Path) -> None:
    convert(goldens / name, tmp_path / "trio", to="mindformers")
    state = torch.load(goldens / name / SAT_WEIGHTS, weights_only=True)["module"]
    for file, expected in by_the_recipe(state).items():
        found = arrays(tmp_path / "trio" / file)
        assert found.keys() == expected.keys()
        for tensor, array in expected.items():
            assert (found[tensor].dtype, found[tensor].shape) == (array.dtype, array.shape)
            assert found[tensor].tobytes() == np.ascontiguousarray(array).tobytes(), tensor


@pytest.mark.parametrize("name", ["a_image_b1", "c_text_only", "a_hf_layout"])
def test_round_trips_are_the_same_bit_by_bit(name: str, goldens: Path, tmp_path: Path) -> None:
    model = convert(goldens / name, tmp_path / "model").output
    trio = convert(model, tmp_path / "trio", to="mindformers")
    assert (trio.output_format, trio.dropped) == ("mindformers", ())
    again = convert(trio.output, tmp_path / "again")
    assert (again.source_format, again.layout, again.dtype, again.dropped) == ("mindformers", "thirds", "float16", ())
    one, other = open_model_directory(model), open_model_directory(again.output)
    assert one.fingerprint == other.fingerprint
    back = convert(again.output, tmp_path / "back", to="mindformers").output
    for file in sorted(trio.output.iterdir()):
        assert file.read_bytes() == (back / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("name", "to"), [("c_text_only", "sat"), ("a_image_b1", "sat"), ("a_hf_layout", "hf")])
def test_by_way_of_the_files_to_other_formats(name: str, to: Any, goldens: Path, tmp_path: Path) -> None:
    """The stray tensor of the SAT archive has a place in the files, and comes back."""
    trio = convert(goldens / name, tmp_path / "trio", to="mindformers").output
    assert convert(trio, tmp_path / "back", to=to).dropped == ()
    file = SAT_WEIGHTS if to == "sat" else "pytorch_model.bin"
    back, original = (torch.load(folder / file, weights_only=True) for folder in (tmp_path / "back", goldens / name))
    if to == "sat":
        back, original = back["module"], original["module"]
    assert back.keys() == original.keys()
    assert all(torch.equal(back[tensor], original[tensor]) for tensor in original)


def test_the_stray_tensor_has_no_place_on_hugging_face(goldens: Path, tmp_path: Path) -> None:
    trio = convert(goldens / "c_text_only", tmp_path / "trio", to="mindformers").output
    assert convert(trio, tmp_path / "hf", to="hf").dropped == ("transformer.position_embeddings.weight",)


def test_a_model_of_our_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    trio = convert(tiny_model_dir, tmp_path / "trio", to="mindformers").output
    assert sorted(path.name for path in trio.iterdir()) == sorted(
        [VIT, QFORMER, GLM, LITE, OWN, "SHA256SUMS", "ice_text.model", "WEIGHTS_LICENSE.txt"]
    )
    convert(trio, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (tiny_model_dir / "tokenizer.model").read_bytes()
    assert open_model_directory(tmp_path / "again").fingerprint == open_model_directory(tiny_model_dir).fingerprint
    convert(trio, tmp_path / "again", force=True)
    convert(tiny_model_dir, trio, to="mindformers", force=True)
    (trio / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which is no part of the checkpoint"):
        convert(tiny_model_dir, trio, to="mindformers", force=True)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    from visualglm.random_model import PRESETS, write_random_model

    model = write_random_model(tmp_path / "model", PRESETS["tiny"])
    trio = convert(model.path, tmp_path / "trio", to="mindformers")
    assert trio.dtype == "bfloat16"
    assert convert(trio.output, tmp_path / "again").dtype == "bfloat16"
    assert open_model_directory(tmp_path / "again").fingerprint == model.fingerprint


# Without our own configuration beside them: as the recipe's converter leaves them.


def recipe(model: ModelDirectory, **text: object) -> str:
    """A recipe for a model, in the recipe's words; JSON is YAML."""
    vision, qformer, chatglm = model.config.vision, model.config.qformer, model.config.text
    model_config = {
        "type": "VisualGLMConfig",
        "qformer_config": {
            "num_hidden_layers": qformer.num_hidden_layers,
            "num_heads": qformer.num_attention_heads,
            "query_length": qformer.num_query_tokens,
            "encoder_width": vision.hidden_size,
        },
        "vision_config": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_attention_heads": vision.num_attention_heads,
            "post_layernorm_residual": False,
        },
        "text_config": {
            "num_layers": chatglm.num_hidden_layers,
            "num_heads": chatglm.num_attention_heads,
            "layernorm_order": "post",
            **{name: getattr(chatglm, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "mask_token_id": chatglm.mask_token_id,
            "gmask_token_id": chatglm.gmask_token_id,
            **text,
        },
    }
    return json.dumps({"seed": 0, "model": {"model_config": model_config, "arch": {"type": "x"}}})


def test_a_recipe_tells_what_tensors_do_not(trio: Path, goldens: Path, tmp_path: Path) -> None:
    model = open_model_directory(convert(goldens / "a_image_b1", tmp_path / "model").output)
    (trio / OWN).unlink()
    (trio / "run_visualglm_lora.yaml").write_text(recipe(model, pet_config={"lora_alpha": 3}))
    (trio / "run_visualglm_6b_image_to_text_generation.yaml").write_text(recipe(model))
    (trio / "run_visualglm_notes.yaml").write_text("seed: 1")
    found = read_mindformers(trio).config
    # How long the window is neither tells.
    window = model.config.text.max_sequence_length
    assert found.text.max_sequence_length == 2048
    text = found.text.model_copy(update={"max_sequence_length": window})
    assert found.model_copy(update={"text": text}) == model.config


def test_the_released_sizes_need_no_recipe() -> None:
    from visualglm.checkpoint.mindformers_config import mindformers_config
    from visualglm.checkpoint.mindformers_keys import places
    from visualglm.config import VisualGLMConfig
    from visualglm.parameters import parameter_shapes

    shapes = parameter_shapes(VisualGLMConfig())
    theirs = {name: place.shape(shapes[ours]) for ours, place in places(shapes) for name in place.names}
    assert mindformers_config(Path("/nowhere"), theirs, None) == VisualGLMConfig()
    assert theirs["visual_encoder.blocks.38.output.mapping.weight"] == (1408, 6144)
    assert theirs["visual_encoder.blocks.0.attention.dense3.weight"] == (1408, 1408)
    assert theirs["query_tokens"] == (1, 32, 768)
    assert theirs["qformer.bert.encoder.layer.10.crossattention.self_att.key.weight"] == (768, 1408)
    assert theirs["llm_proj.weight"] == (4096, 768)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda it: it.clear(), r"its vision\.image_size is 224, and they have \d+"),
        (lambda it: it["text"].update(vocab_size=400), r"its text\.vocab_size is 400, and they have \d+"),
        (lambda it: it["text"].update(num_hidden_layers=9), r"its text\.num_hidden_layers is 9, and they have \d+"),
        (lambda it: it.pop("qformer"), r"its qformer\.hidden_size is 768, and they have \d+"),
    ],
)
def test_a_configuration_of_another_model(spoil: Callable[[Any], object], message: str, trio: Path) -> None:
    values = json.loads((trio / OWN).read_text())
    values["text"] |= dict.fromkeys(("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id"), 4)
    spoil(values)
    (trio / OWN).write_text(json.dumps(values))
    told = rf"^{trio / OWN} tells of another model than the tensors beside it: {message}; put the file that was .*\.$"
    with pytest.raises(CheckpointError, match=told):
        read_mindformers(trio)


def test_without_a_recipe_heads_are_not_guessed(trio: Path) -> None:
    (trio / OWN).unlink()
    with pytest.raises(
        CheckpointError, match=r"how many attention heads the vision part .*run_visualglm\*\.yaml"
    ) as it:
        read_mindformers(trio)
    assert "\n" not in str(it.value)


@pytest.mark.parametrize(
    ("change_text", "message"),
    [
        ({"layernorm_order": "pre"}, "layernorm_order is 'pre', and only 'post' is supported"),
        ({"num_heads": "many"}, "text.num_attention_heads"),
        ({"num_layers": 3}, r"The tensors in .*glm_6b\.ckpt do not fit its configuration"),
        ({"num_heads": 1}, "does not hold the rotary frequencies"),
    ],
)
def test_recipes_that_do_not_fit(
    change_text: dict[str, object], message: str, trio: Path, goldens: Path, tmp_path: Path
) -> None:
    model = open_model_directory(convert(goldens / "a_image_b1", tmp_path / "model").output)
    (trio / OWN).unlink()
    (trio / "run_visualglm_lora.yaml").write_text(recipe(model, **change_text))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_mindformers(trio)


def test_recipes_that_differ(trio: Path, goldens: Path, tmp_path: Path) -> None:
    model = open_model_directory(convert(goldens / "a_image_b1", tmp_path / "model").output)
    (trio / OWN).unlink()
    (trio / "run_visualglm_a.yaml").write_text(recipe(model))
    (trio / "run_visualglm_b.yaml").write_text(recipe(model, layernorm_epsilon=1e-3))
    with pytest.raises(CheckpointError, match=r"run_visualglm_a\.yaml and run_visualglm_b\.yaml tell of different"):
        read_mindformers(trio)


def test_a_recipe_takes_a_package_to_read(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trio / OWN).unlink()
    (trio / "run_visualglm_lora.yaml").write_text("{}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "visualglm.yaml_file", raising=False)
    with pytest.raises(CheckpointError, match=r"run_visualglm_lora\.yaml needs PyYAML; `pip install pyyaml` adds it"):
        read_mindformers(trio)


@pytest.mark.parametrize("missing", [VIT, QFORMER])
def test_all_three_are_needed(missing: str, trio: Path, tmp_path: Path) -> None:
    (trio / missing).unlink()
    with pytest.raises(CheckpointError, match=f"trio lacks {missing}.* put all three files of a model there"):
        convert(trio, tmp_path / "out")


def test_the_file_for_lite_is_no_language_model(trio: Path) -> None:
    (trio / GLM).unlink()
    with pytest.raises(CheckpointError, match=r"lacks glm_6b\.ckpt \(glm_6b_for_lite\.ckpt holds the embeddings alone"):
        read_mindformers(trio)


FAULTS: dict[str, tuple[str, Callable[[Arrays], object], str]] = {
    "missing": (VIT, lambda values: values.pop("visual_encoder.cls_tokens"), "1 missing .visual_encoder.cls_tokens"),
    "no word embeddings": (
        GLM,
        lambda values: values.pop("transformer.word_embeddings.embedding_table"),
        r"lacks transformer\.word_embeddings\.embedding_table, so it is not of VisualGLM|1 missing",
    ),
    "of the wrong rank": (
        QFORMER,
        lambda values: values.update(query_tokens=values["query_tokens"][0]),
        r"query_tokens is \[\d+, \d+\] instead of \[1, \d+, \d+\]|has \[\d+, \d+\] as the shape of query_tokens",
    ),
    "unexpected": (GLM, lambda values: values.update(more=np.ones((2, 2), np.float16)), r"1 unexpected \(more\)"),
    "another model's norm": (
        QFORMER,
        lambda values: values.update({"ln_vision.gamma": values["ln_vision.gamma"] + 1}),
        "is not one model: ln_vision.gamma differs",
    ),
    "other rotary frequencies": (
        GLM,
        lambda values: values.update(
            {"transformer.layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float16) / 3}
        ),
        "does not hold the rotary frequencies",
    ),
    "whole numbers": (
        GLM,
        lambda values: values.update({"lm_head.weight": values["lm_head.weight"].astype(np.int8)}),
        "lm_head.weight is int8",
    ),
}


@pytest.mark.parametrize("own_config", [True, False])
@pytest.mark.parametrize("case", FAULTS)
def test_files_that_are_not_whole(case: str, own_config: bool, trio: Path, goldens: Path, tmp_path: Path) -> None:
    file, edit, message = FAULTS[case]
    change(trio / file, edit)
    if not own_config:
        model = open_model_directory(convert(goldens / "a_image_b1", tmp_path / "model").output)
        (trio / OWN).unlink()
        (trio / "run_visualglm.yaml").write_text(recipe(model))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(trio, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_training_keeps_beside_the_weights_is_left_out(trio: Path, tmp_path: Path) -> None:
    change(trio / GLM, lambda values: values.update(epoch_num=np.array(3), loss_scale=np.ones(1, np.float32)))
    convert(trio, tmp_path / "out")
    assert not {"epoch_num", "loss_scale"} & open_model_directory(tmp_path / "out").extras.keys()


@pytest.mark.parametrize("name", [VIT, QFORMER, GLM, OWN])
def test_a_flipped_bit_is_told(name: str, goldens: Path, tmp_path: Path) -> None:
    made = convert(goldens / "a_image_b1", tmp_path / "made", to="mindformers").output
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made, check=True)
    assert {line.split()[1] for line in (made / "SHA256SUMS").read_text().splitlines()} == {
        VIT,
        QFORMER,
        GLM,
        LITE,
        OWN,
    }
    content = bytearray((made / name).read_bytes())
    content[len(content) // 2] ^= 1
    (made / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{made} is damaged: {name} changed since SHA256SUMS was written; get"):
        read_mindformers(made)


def test_lists_of_hashes_that_are_none(goldens: Path, tmp_path: Path) -> None:
    made = convert(goldens / "a_image_b1", tmp_path / "made", to="mindformers").output
    file = made / "SHA256SUMS"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line.replace("  ", " *") for line in lines))
    read_mindformers(made)
    file.write_text("".join(line for line in lines if GLM not in line))
    with pytest.raises(CheckpointError, match=rf"SHA256SUMS does not list {GLM}; get it again, or remove it\.$"):
        read_mindformers(made)
    file.write_text("hello\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS is no list of SHA-256 as `sha256sum` writes it; get it"):
        read_mindformers(made)


def test_frequencies_of_more_layers_than_there_are(trio: Path, tmp_path: Path) -> None:
    """The recipe's converter writes them for 28 layers, whatever the model has."""
    key = "transformer.layers.{}.attention.rotary_emb.inv_freq"
    change(trio / GLM, lambda values: values.update({key.format(n): values[key.format(0)] for n in range(28)}))
    out = convert(trio, tmp_path / "out").output
    assert key.format(27) in open_model_directory(out).extras
    shutil.rmtree(tmp_path / "trio")
    again = convert(out, tmp_path / "trio", to="mindformers").output
    assert key.format(27) in arrays(again / GLM)
