import pickle
import random
from functools import cache
from pathlib import Path

import pytest
import sentencepiece

from visualglm.config import TextConfig
from visualglm.errors import TokenizerError
from visualglm.processing.tokenizer import StreamDecoder, Tokenizer

ORDINARY = [
    "a",
    "cat ",
    "问",
    "：",
    "\n",
    "\t",
    "  ",
    "   ",
    ". ",
    "dog",
    ">",
    "<",
    "[",
    " ",
    "猫",
    "The ",
    " " * 85,
    "é",
    "😀",
]
CONTROL_SPELLINGS = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<unused_0>",
    "<sop>",
    "<eop>",
    "<ENC>",
    "<dBLOCK>",
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<n>",
    "<|tab|>",
    "<|blank_2|>",
    "<|blank_80|>",
    "<0x41>",
    "<0xE4>",
]
NEAR_SPELLINGS = ["<n", "n>", "<<n>>", "[gMASK", "<|blank_", "3|>", "▁", "▁▁", "\x00", "<img>", "</img>"]


def texts(parts, count, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(count)]


@cache
def sentencepiece_of(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def original_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for count in range(80, 1, -1):
        text = text.replace(" " * count, f"<|blank_{count}|>")
    return sentencepiece_of(tokenizer.path).encode(text)


def original_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = sentencepiece_of(tokenizer.path).decode(ids)
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    for count in range(2, 81):
        text = text.replace(f"<|blank_{count}|>", " " * count)
    return text


def special_text(tokenizer: Tokenizer, token_id: int) -> str | None:
    """The piece if it is one that text must not turn into, or stands for whitespace."""
    piece = sentencepiece_of(tokenizer.path).id_to_piece(token_id)
    return piece if piece in (*CONTROL_SPELLINGS, "<|blank_3|>") and not piece.startswith("<0x") else None


@pytest.mark.parametrize("specials", ["released", "user_defined"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}])
def test_ordinary_text_has_the_ids_and_the_text_of_the_original(make_tokenizer, specials, model_type, options):
    tokenizer = make_tokenizer(specials, model_type=model_type, **options)
    for text in texts(ORDINARY, 150, seed=1):
        ids = tokenizer.encode(text)
        assert ids == original_ids(tokenizer, text), repr(text)
        assert tokenizer.decode(ids) == original_text(tokenizer, ids), repr(text)


@pytest.mark.parametrize("specials", ["released", "user_defined", "control"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_any_text_survives_a_round_trip(make_tokenizer, specials, model_type):
    tokenizer = make_tokenizer(specials, model_type=model_type)
    for text in texts([*ORDINARY, *CONTROL_SPELLINGS, *NEAR_SPELLINGS], 1000, seed=2):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("specials", ["released", "user_defined", "control"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_a_spelled_control_token_stays_text(make_tokenizer, byte_fallback, specials, rule):
    tokenizer = make_tokenizer(specials, byte_fallback, normalization_rule_name=rule)
    for spelling in CONTROL_SPELLINGS:
        for text in (spelling, f"a {spelling} dog", spelling * 3, f"问{spelling}猫"):
            ids = tokenizer.encode(text)
            assert [piece for token_id in ids if (piece := special_text(tokenizer, token_id))] == []
            assert tokenizer.decode(ids) == text


def test_a_spelling_that_the_normalizer_makes_stays_text_too(make_tokenizer):
    tokenizer = make_tokenizer("user_defined", normalization_rule_name="nmt_nfkc")
    for text, expected in {"＜ｎ＞": "<n>", "<\x01n>": "<n>", "［gMASK］": "[gMASK]"}.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == expected
        assert not any(special_text(tokenizer, token_id) for token_id in ids)


def test_pieces_of_a_normal_kind_are_no_control_tokens_either(tmp_path, make_tokenizer):
    original = make_tokenizer("user_defined")
    model = original.path.read_bytes()
    for piece in ("<n>", "<sop>", "[gMASK]"):
        entry = b"\x0a" + bytes([len(piece)]) + piece.encode() + b"\x15\x00\x00\x00\x00\x18"
        assert model.count(entry + b"\x04") == 1
        model = model.replace(entry + b"\x04", entry + b"\x01")  # USER_DEFINED to NORMAL
    path = tmp_path / "normal.model"
    path.write_bytes(model)
    tokenizer = Tokenizer(path)
    for text in texts(["<n>", "<sop>", "[gMASK]", "\n", "a", " "], 300, seed=3):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.gmask_id} & set(ids)


def test_text_no_vocabulary_can_hold(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_without_bytes_an_unknown_character_is_the_unknown_piece(make_tokenizer):
    tokenizer = make_tokenizer(byte_fallback=False)
    assert tokenizer.decode(tokenizer.encode("a\x00<n>")) == "a ⁇ <n>"
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


def test_runs_of_blanks_are_taken_longest_first(tokenizer):
    pieces = sentencepiece_of(tokenizer.path).id_to_piece
    assert pieces(tokenizer.encode(" " * 162)) == ["▁", "<|blank_80|>", "<|blank_80|>", "<|blank_2|>"]
    assert pieces(tokenizer.encode("a" + " " * 81 + "a")) == ["▁a", "<|blank_80|>", "▁a"]


def test_control_tokens_and_unknown_ids_stand_for_no_text(make_tokenizer):
    for specials in ("released", "user_defined"):
        tokenizer = make_tokenizer(specials)
        controls = [tokenizer.pad_id, tokenizer.mask_id, tokenizer.gmask_id, tokenizer.bos_id, tokenizer.eos_id]
        assert len(set(controls)) == 5
        beyond = [tokenizer.vocab_size, 130527, -1]
        assert tokenizer.decode([*controls, *tokenizer.encode("a cat"), *beyond]) == "a cat"


def test_image_ids_before_the_text_shift_every_id(tokenizer):
    shifted = Tokenizer(tokenizer.path, num_image_tokens=20000)
    ids = shifted.encode("a cat\n<n>")
    assert ids == [20000 + token_id for token_id in tokenizer.encode("a cat\n<n>")]
    assert shifted.decode([5, *ids]) == "a cat\n<n>"
    assert shifted.bos_id == 20000 + tokenizer.bos_id
    assert shifted.vocab_size == 20000 + tokenizer.vocab_size


def text_config(tokenizer: Tokenizer, offset: int = 0, **changes: int) -> TextConfig:
    ids = {
        f"{name}_token_id": offset + getattr(tokenizer, f"{name}_id") for name in ("pad", "mask", "gmask", "bos", "eos")
    }
    return TextConfig(**{**ids, **changes})


def test_the_tokenizer_of_a_model_finds_its_offset(tokenizer):
    for offset in (0, 20000):
        fitted = Tokenizer.for_model(tokenizer.path, text_config(tokenizer, offset))
        assert (fitted.num_image_tokens, fitted.bos_id) == (offset, offset + tokenizer.bos_id)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"gmask_token_id": 99}, "text.gmask_token_id is 99"), ({"vocab_size": 100}, "text.vocab_size is 100")],
)
def test_a_tokenizer_of_another_model_is_refused(tokenizer, changes, words):
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.for_model(tokenizer.path, text_config(tokenizer, **changes))


def test_a_stream_gives_whole_characters_and_the_same_text(tokenizer):
    rng = random.Random(4)
    for _ in range(500):
        ids = rng.choices(range(tokenizer.vocab_size + 5), k=rng.randint(0, 20))
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(token_id) for token_id in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in tokenizer.encode("😀\n  a")]
    assert pieces == ["", "", "", "", "😀", "\n", "  ", "a"]


def test_stray_bytes_decode_as_in_the_original(tokenizer):
    rng = random.Random(5)
    first = tokenizer.encode("\x00")[-1]
    for _ in range(300):
        ids = [first + rng.randrange(128, 256) for _ in range(rng.randint(1, 6))]
        assert tokenizer.decode(ids) == original_text(tokenizer, ids)


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a <sop>\n") == tokenizer.encode("a <sop>\n")
