"""How near an answer is to its references: text against text, no model in sight.

A row's references are answers of equal right. Each function returns a number from 0 to 1 unless it says otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, zip_longest
from math import exp, log, sqrt

from visualglm.processing.answer import clean_answer
from visualglm.processing.prompt import is_chinese

Pair = tuple[str, Sequence[str]]
"""An answer and its references."""

# --- words ------------------------------------------------------------------------------------------------------------

# A Chinese character, or a run of letters and digits of another script; what is neither is punctuation.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:['’][^\W_{_HAN}]+)*")


def words(text: str) -> list[str]:
    """Chinese characters one by one, other scripts word by word in lower case; punctuation left out."""
    return _WORD.findall(text.lower())


# --- one row ----------------------------------------------------------------------------------------------------------


def exact_match(answer: str, references: Iterable[str]) -> float:
    """1 if the answer is one of the references, all cleaned up as the model's answers are."""
    return float(clean_answer(answer) in map(clean_answer, references))


def rouge_l(answer: str, references: Iterable[str]) -> float:
    """The best F1 of longest common subsequences of `words`, over the references.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3.1, with beta 1.
    """
    given = words(answer)
    return max(_lcs_f1(given, words(reference)) for reference in references)


def _lcs_f1(first: Sequence[str], second: Sequence[str]) -> float:
    """2 PR / (P + R) for P = lcs / len(first) and R = lcs / len(second); two empty texts are alike."""
    if not first and not second:
        return 1.0
    return 2 * _lcs_length(first, second) / (len(first) + len(second))


def _lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """With a bit for each word of `first`, as Hyyrö, "Bit-parallel LCS-length computation revisited" (2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


# --- VQA accuracy -----------------------------------------------------------------------------------------------------

_ANNOTATORS = 10
_ASCII_MARKS = str.maketrans("，！；？。（）【】“”", ',!;?.()[]""')
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_GROUPED_DIGITS = re.compile(r"\d,\d")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# What is often written without them; "well", "ill" and the like are words of their own.
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHES.split()}


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy of the VQA challenge, with its normalisation on both sides.

    Antol et al., "VQA: Visual Question Answering" (2015), section 3: min(matching references / 3, 1). With ten
    references or more, those of as many people, it is the mean over all sets that leave one of them out, as the
    challenge computes it: 0, 0.3, 0.6, 0.9 and then 1 for 0, 1, 2, 3 and more of ten. With fewer, which are
    alternatives and no votes, it is 1 if any of them matches.
    """
    given = normalized_for_vqa(answer)
    matching = sum(normalized_for_vqa(reference) == given for reference in references)
    if len(references) < _ANNOTATORS:
        return float(matching > 0)
    others = len(references) - matching
    return (matching * min((matching - 1) / 3, 1) + others * min(matching / 3, 1)) / len(references)


def normalized_for_vqa(text: str) -> str:
    """Lower case, without punctuation, articles and periods (but in numbers), with number words as digits.

    The normalisation of the VQA challenge; Chinese punctuation counts as its ASCII counterpart.
    """
    whole = text = " ".join(clean_answer(text).translate(_ASCII_MARKS).split())
    for mark in _MARKS:
        # Dropped if it stands beside a blank somewhere, or the text has a number like 1,000; else it parts words.
        dropped = f"{mark} " in whole or f" {mark}" in whole or _GROUPED_DIGITS.search(whole)
        text = text.replace(mark, "" if dropped else " ")
    kept = (_DIGITS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in kept if word not in _ARTICLES)


# --- CIDEr-D ----------------------------------------------------------------------------------------------------------

_LONGEST_NGRAM = 4
_SIGMA = 6.0
_SCALE = 10.0
_Ngram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """The tf-idf of the n-grams of a text for each n, the norms of these, and how many words the text has."""

    weights: tuple[dict[_Ngram, float], ...]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """CIDEr-D of answers, weighted by how rare n-grams are in the references of a whole data set: 0 to 10.

    Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015), sections 3 and 5: the cosine of
    tf-idf vectors of n-grams, clipped, times a Gaussian of the difference in length (sigma 6), times 10, as the mean
    over all references and over n = 1 … 4. The idf of an n-gram is log(rows / rows with a reference that has it).
    Words are those of `words`, without the stemming of the paper, as in the code that is commonly used. In a data set
    whose rows all have the same references nothing is rare, and every score is 0.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        rows = [set(chain.from_iterable(map(_ngrams, row))) for row in references]
        self._row_count = len(rows)
        self._rows_with = Counter(chain.from_iterable(rows))

    def score(self, answer: str, references: Sequence[str]) -> float:
        """The score of one row."""
        given = self._vector(answer)
        similarities = [_similarity(given, self._vector(reference)) for reference in references]
        return _SCALE * sum(similarities) / len(similarities)

    def _vector(self, text: str) -> _Vector:
        weights: tuple[dict[_Ngram, float], ...] = tuple({} for _ in range(_LONGEST_NGRAM))
        for ngram, count in _ngrams(text).items():
            idf = log(self._row_count) - log(max(1, self._rows_with[ngram]))
            weights[len(ngram) - 1][ngram] = count * idf
        norms = tuple(sqrt(sum(weight * weight for weight in of_length.values())) for of_length in weights)
        return _Vector(weights, norms, len(words(text)))


def _ngrams(text: str) -> Counter[_Ngram]:
    """How often each n-gram of `words` is in `text`, for all n."""
    found = words(text)
    return Counter(
        tuple(found[start : start + length])
        for length in range(1, _LONGEST_NGRAM + 1)
        for start in range(len(found) - length + 1)
    )


def _similarity(given: _Vector, reference: _Vector) -> float:
    """0 to 1: the mean over n of clipped cosines, times the penalty of length."""
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        given.weights, reference.weights, given.norms, reference.norms, strict=True
    ):
        shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
        if shared:
            total += shared / (our_norm * their_norm)
    penalty = exp(-((given.length - reference.length) ** 2) / (2 * _SIGMA**2))
    return penalty * total / _LONGEST_NGRAM


# --- BLEU -------------------------------------------------------------------------------------------------------------


def has_bleu() -> bool:
    """Whether sacrebleu, which computes it, is installed."""
    return find_spec("sacrebleu") is not None


def bleu_4(pairs: Iterable[Pair]) -> float:
    """BLEU-4 of a whole data set as sacrebleu computes it, 0 to 100.

    A row with a Chinese character in its references is cut up by sacrebleu's tokenizer "zh", any other by "13a";
    answers and references are cleaned up first, as the model's answers are. Papineni et al., "BLEU: a Method for
    Automatic Evaluation of Machine Translation" (2002); Post, "A Call for Clarity in Reporting BLEU Scores" (2018).
    Needs the extra "evaluate".
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    chinese, other = TokenizerZh(), Tokenizer13a()  # type: ignore[no-untyped-call]
    answers, references = [], []
    for answer, accepted in pairs:
        tokenize = chinese if any(map(is_chinese, accepted)) else other
        answers.append(tokenize(clean_answer(answer)))
        references.append([tokenize(clean_answer(reference)) for reference in accepted])
    # As sacrebleu wants it: the first reference of every row, then the second, with None where there is no more.
    columns = [list(column) for column in zip_longest(*references)]
    return float(BLEU(tokenize="none", force=True).corpus_score(answers, columns).score)
