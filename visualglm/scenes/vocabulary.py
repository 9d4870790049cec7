"""The tokenizer of the built-in model: a SentencePiece model trained on the questions and answers about scenes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from visualglm.scenes.questions import ask_about
from visualglm.scenes.scene import WORDS, make_scene
from visualglm.scenes.wording import KINDS, LANGUAGES, NO_PICTURE, TEXT_ONLY, ZH

CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_MARKUP_PIECES = ("<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 9)))
# Pieces do not cross this mark, so that every name stays a piece of its own where a language writes no blanks.
_BOUNDARY = "¦"
_NAMES = re.compile(
    "|".join(sorted({*ZH.names.values(), *ZH.places.values(), *WORDS, ZH.any_shape, "一个"}, key=len)[::-1])
)
_PROMPT_PARTS = ("<img>", "</img>问：", "答：", "</img>Q:", "Q:", "A:")


def train_tokenizer(path: Path, *, vocab_size: int = 768, scenes: int = 6000) -> None:
    """Write `tokenizer.model`: byte pairs with bytes to fall back on; pad, unk and controls as in the released one."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(_NAMES.sub(rf"{_BOUNDARY}\g<0>{_BOUNDARY}", text) for text in _sentences(scenes)),
        pretokenization_delimiter=_BOUNDARY,
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=list(CONTROL_PIECES),
        user_defined_symbols=list(_MARKUP_PIECES),
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink(missing_ok=True)


def _sentences(scenes: int) -> Iterator[str]:
    printable = "".join(map(chr, range(33, 127)))
    for _ in range(40):
        yield from _PROMPT_PARTS
        yield from WORDS
        yield from printable
    for language in LANGUAGES:
        for question, answer in TEXT_ONLY[language]:
            yield from (question, answer, NO_PICTURE[language])
    for seed in range(scenes):
        rng = np.random.default_rng([seed, 2])
        for language in LANGUAGES:
            found = ask_about(make_scene(seed), KINDS[seed % len(KINDS)], language, rng)
            if found is not None:
                yield from (found.question, found.answer)
