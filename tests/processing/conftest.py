"""SentencePiece models trained here on a few sentences, with GLM's special pieces in the ways a file may hold them."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from visualglm.processing.tokenizer import Tokenizer

CORPUS = (
    "问：这张图片里有什么？\n答：一只猫坐在红色的沙发上。",
    "Q: What is in the picture? A: a red cat sits on a sofa, and 3 dogs.",
    '<img></img> "hello" [world] {x|y} _ a<n>b<n><n> <|blank_2|> <sop> 0x41 / 1234567890',
    "The quick brown fox jumps over the lazy dog; THE LAZY DOG! MASK gMASK unused ENC dBLOCK",
)
CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WHITESPACE = ["<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]
# How the special pieces are held: `released` is the way of ice_text.model.
SPECIALS = {
    "released": {"control_symbols": CONTROLS, "user_defined_symbols": WHITESPACE},
    "user_defined": {"user_defined_symbols": [*CONTROLS, "<pad>", *WHITESPACE], "pad_id": -1},
    "control": {"control_symbols": [*CONTROLS, *WHITESPACE]},
    "none": {},
}


def train(specials: str, byte_fallback: bool, **options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{
            "vocab_size": 700 if byte_fallback else 440,
            "byte_fallback": byte_fallback,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "pad_id": 3,
            "pad_piece": "<pad>",
            **SPECIALS[specials],
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Trains a model (once for the same options) and loads it."""
    made: dict[str, Path] = {}

    def make(specials: str = "released", byte_fallback: bool = True, **options: object) -> Tokenizer:
        key = repr((specials, byte_fallback, sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
            made[key].write_bytes(train(specials, byte_fallback, **options))
        return Tokenizer(made[key])

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer()
