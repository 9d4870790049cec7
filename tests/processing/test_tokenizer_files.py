import os
import re
import zipfile

import pytest

from visualglm.errors import TokenizerError
from visualglm.processing.tokenizer import Tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a\nsize 2706249\n"
SAFETENSORS = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
FOREIGN = {
    "a git-lfs pointer": POINTER,
    "empty": b"",
    "a JSON file": b'{"vocab_size": 1}',
    "a safetensors file": SAFETENSORS,
    "a pickled Python object": b"\x80\x02}q\x00.",
    "a web page": b"<!DOCTYPE html><html></html>",
    "not a SentencePiece model": b"hello, this is text",
}


def refusal(path) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(path)
    message = str(caught.value)
    assert str(path) in message
    assert "2706249 bytes" in message and "5e974d9a69c242ce" in message
    assert message.count("\n") == 0 and message.endswith(".")
    return message


@pytest.mark.parametrize("what", FOREIGN)
def test_another_kind_of_file_is_named(tmp_path, what):
    path = tmp_path / "ice_text.model"
    path.write_bytes(FOREIGN[what])
    assert f"is {what}" in refusal(path)


def test_a_checkpoint_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    assert "a PyTorch checkpoint" in refusal(path)


def test_a_missing_file_a_folder_a_pipe_and_a_huge_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "ice_text.model")
    assert "a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**30)
    assert "too large" in refusal(tmp_path / "huge")


def test_a_truncated_model_is_refused_wherever_it_is_cut(tmp_path, tokenizer):
    model = tokenizer.path.read_bytes()
    path = tmp_path / "cut.model"
    for length in [*range(1, len(model) - 1, 211), len(model) - 1]:
        path.write_bytes(model[:length])
        assert re.search("cut short|not a SentencePiece model", refusal(path)), length


def test_a_damaged_model_is_refused_or_harmless(tmp_path, tokenizer):
    model = bytearray(tokenizer.path.read_bytes())
    path = tmp_path / "damaged.model"
    for position in range(0, len(model), 997):
        damaged = model.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert not Tokenizer(path).is_released
        except TokenizerError as error:
            assert str(path) in str(error)


def test_a_model_without_the_special_pieces_names_them(make_tokenizer):
    with pytest.raises(TokenizerError, match=re.escape("no piece [MASK] [gMASK] <sop> <eop> <n>")):
        make_tokenizer("none")


def test_another_model_is_accepted_but_not_released(tokenizer):
    assert tokenizer.is_released is False
    assert len(tokenizer.sha256) == 64
