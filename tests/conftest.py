"""Models to test with: random weights with a small tokenizer, and the built-in one."""

import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import write_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.export_cache import CACHE_VARIABLE
from visualglm.loading import builtin_path
from visualglm.parameters import Shape, parameter_shapes
from visualglm.processing.tokenizer import Tokenizer

# MindSpore has an environment of its own, which `make test-mindspore` sets up.
collect_ignore = [] if find_spec("mindspore") else ["mindspore"]

CORPUS = (
    "问：这张图片里有什么？\n答：一只猫坐在红色的沙发上。",
    "问：描述这张图片。\n答：图里有三个蓝色的圆。",
    "Q:What is in the picture?\nA:a red cat sits on a sofa, and 3 dogs.",
    "<img></img> The quick brown fox jumps over the lazy dog 1234567890",
)
CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WHITESPACE = ["<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]
WINDOW = 192


@pytest.fixture(scope="session", autouse=True)
def export_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exports made on first use go here, and not to the cache of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def heeds_ctrl_c() -> Iterator[None]:
    """What a shell runs in the background ignores Ctrl-C, and so would all that tests start and interrupt."""
    if ignored := signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few sentences, with the special pieces as `ice_text.model` holds them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 10),
            model_writer=file,
            vocab_size=600,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=3,
            pad_piece="<pad>",
            control_symbols=CONTROLS,
            user_defined_symbols=WHITESPACE,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer_path: Path) -> VisualGLMConfig:
    """The smallest model with every kind of part, for `tiny_tokenizer_path`."""
    tokenizer = Tokenizer(tiny_tokenizer_path)
    return VisualGLMConfig(
        vision=VisionConfig(
            image_size=28, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        qformer=QFormerConfig(
            num_query_tokens=4,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            cross_attention_layers=(0,),
        ),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_sequence_length=WINDOW,
            pad_token_id=tokenizer.pad_id,
            mask_token_id=tokenizer.mask_id,
            gmask_token_id=tokenizer.gmask_id,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        ),
    )


@pytest.fixture(scope="session")
def tiny_model_dir(
    tiny_config: VisualGLMConfig, tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model directory of random weights. Its answers mean nothing, but depend on question and image. Do not write."""
    random = np.random.default_rng(7)
    tensors = {name: _random_tensor(name, shape, random) for name, shape in parameter_shapes(tiny_config).items()}
    checkpoint = Checkpoint(
        tiny_config, tensors, Source(format="random"), tokenizer_path=tiny_tokenizer_path, license_text="Free to use.\n"
    )
    return write_model_directory(tmp_path_factory.mktemp("model") / "tiny", checkpoint).path


@pytest.fixture(scope="session")
def builtin_model_dir() -> Path:
    """The built-in model, for tests that need right answers; they are skipped where it is not built yet."""
    path = builtin_path()
    if not (path / "config.json").is_file():
        pytest.skip("the built-in model is not there")
    return path


def _random_tensor(name: str, shape: Shape, random: np.random.Generator) -> LazyTensor:
    values = random.normal(0, 1 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.1, shape)
    if "norm" in name and name.endswith("weight"):
        values += 1
    array = values.astype(np.float16)
    return LazyTensor("float16", shape, lambda: array)
