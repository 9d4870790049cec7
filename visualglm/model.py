"""`VisualGLM`: a loaded model that is asked about images. Joins processing, a backend and generation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from visualglm.backends.base import AdaptableBackend, Backend, ImageEmbeds
from visualglm.checkpoint.adapter_dir import AdapterDirectory, open_adapter, require_base, require_finite
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError, DeviceError, ImageError, PromptError, TokenizerError
from visualglm.faults import brief
from visualglm.generation.config import DEFAULT_MAX_NEW_TOKENS, GenerationConfig
from visualglm.generation.decoding import Decoding, generate_ids
from visualglm.generation.text import AnswerStream, answer_pieces
from visualglm.processing.image import ImageLimits, load_image, preprocess
from visualglm.processing.layout import Layout, layout_from_ids, pad_batch
from visualglm.processing.prompt import Language, Prompt, Turn, build_prompt
from visualglm.processing.tokenizer import Tokenizer

ImageSource = str | Path | bytes | Image.Image | NDArray[Any] | ImageEmbeds


@dataclass(frozen=True)
class Reply:
    """An answer and how it came about."""

    text: str
    prompt_tokens: int
    new_tokens: int
    dropped_turns: int


class Answer(Iterator[str]):
    """An answer in the making: iterate over its pieces. The counts are those of what has been made so far."""

    def __init__(self, prompt: Prompt, stream: AnswerStream, pieces: Iterator[tuple[int, str]]) -> None:
        self.prompt_tokens = len(prompt.input_ids)
        self.dropped_turns = prompt.dropped_turns
        self._stream = stream
        self._pieces = pieces

    @property
    def new_tokens(self) -> int:
        return self._stream.new_tokens

    def __next__(self) -> str:
        return next(piece for _, piece in self._pieces if piece)


class VisualGLM:
    """A model on a backend, with its tokenizer; made by `visualglm.load`.

    directory: what it was loaded from, which its adapters must belong to.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        name: str = "model",
        directory: ModelDirectory | None = None,
        image_limits: ImageLimits | None = None,
        allow_urls: bool = False,
    ) -> None:
        self.backend = backend
        self.name = name
        self.image_limits = image_limits or ImageLimits()
        self.allow_urls = allow_urls
        self._tokenizer = tokenizer
        self._directory = directory
        self._adapters: list[str] = []
        self._adapter: str | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that can be used."""
        return tuple(self._adapters)

    @property
    def adapter(self) -> str | None:
        """The name of the adapter in use."""
        return self._adapter

    def add_adapter(self, name: str, adapter: str | Path | AdapterDirectory) -> None:
        """Load an adapter, given as its folder or opened, beside the model, to be used by `use_adapter(name)`.

        Raises a `VisualGLMError` if there is none, it belongs to another model (one that names no model is taken
        where it fits), the name is empty or taken, or the model runs on a backend that cannot switch.
        """
        if not name:
            raise ConfigError("The name of an adapter is empty; give one to call it by.")
        if name in self._adapters:
            raise ConfigError(f"There is an adapter {name!r} already; give this one another name.")
        backend, base = self._switchable()
        if not isinstance(adapter, AdapterDirectory):
            adapter = open_adapter(adapter)
        require_base(adapter, base)
        require_finite(adapter)
        backend.add_adapter(name, adapter)
        self._adapters.append(name)

    def use_adapter(self, name: str | None) -> None:
        """Answer with an adapter that was added from now on, or with none; nothing is loaded again.

        Images that were encoded with another adapter should be encoded again, if one of the two changes the image
        encoder. Raises `ConfigError` if there is no adapter of that name, `DeviceError` if the backend cannot switch.
        """
        backend, _ = self._switchable()
        if name is not None and name not in self._adapters:
            known = f"there are {', '.join(self._adapters)}" if self._adapters else "none was added"
            raise ConfigError(f"There is no adapter {name!r}: {known}; give one that is there, or none.")
        if name != self._adapter:
            backend.use_adapter(name)
        self._adapter = name

    def _switchable(self) -> tuple[AdaptableBackend, ModelDirectory]:
        if self._directory is None or not isinstance(self.backend, AdaptableBackend):
            raise DeviceError(
                f"The model {self.name} runs as {self.backend.description}, which cannot switch adapters; "
                "load the model directory with the torch backend (--backend torch)."
            )
        return self.backend, self._directory

    @property
    def config(self) -> VisualGLMConfig:
        return self.backend.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `TokenizerError` if the model directory came without one."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"The model {self.name} has no tokenizer.model, so it cannot be asked in words; "
                "convert it again with --tokenizer ice_text.model."
            )
        return self._tokenizer

    def ask(
        self,
        image: ImageSource | None,
        question: str,
        *,
        history: Sequence[Turn] = (),
        language: Language = "auto",
        **generation: Any,
    ) -> str:
        """The answer to one question.

        image: a path, encoded bytes, a `data:` URL, a PIL image, a uint8 array, an `encode_image` result, or None.
        history: earlier (question, answer) pairs about the same image, the oldest first.
        generation: options of `GenerationConfig`; greedy by default.
        History that does not fit the model's window is left out, the oldest turns first, with a `UserWarning`.
        Raises a `VisualGLMError` with one clear sentence for whatever cannot be answered.
        """
        answer = self.stream(image, question, history=history, language=language, **generation)
        if answer.dropped_turns:
            warnings.warn(
                f"The history is too long: the oldest {answer.dropped_turns} turns are left out.", stacklevel=2
            )
        return "".join(answer)

    def stream(
        self,
        image: ImageSource | None,
        question: str,
        *,
        history: Sequence[Turn] = (),
        language: Language = "auto",
        **generation: Any,
    ) -> Answer:
        """The answer as `ask` gives it, in pieces as they are made; never half a character."""
        config = GenerationConfig.from_options(**generation)
        prompt = self.prompt(question, history=history, has_image=image is not None, language=language, config=config)
        embeds = [] if image is None else [self.encode_image(image)]
        streams, pieces = self._start([prompt], embeds, config)
        return Answer(prompt, streams[0], pieces)

    def ask_batch(
        self,
        pairs: Iterable[tuple[ImageSource | None, str]],
        *,
        batch_size: int = 16,
        language: Language = "auto",
        **generation: Any,
    ) -> list[str]:
        """Answers to (image, question) pairs, in their order, each as `ask` alone would give it.

        Rows of like length share a batch; rows with and without an image may be mixed.
        """
        return [reply.text for reply in self.reply_batch(pairs, batch_size=batch_size, language=language, **generation)]

    def reply_batch(
        self,
        pairs: Iterable[tuple[ImageSource | None, str]],
        *,
        histories: Sequence[Sequence[Turn]] | None = None,
        batch_size: int = 16,
        language: Language = "auto",
        **generation: Any,
    ) -> list[Reply]:
        """As `ask_batch`, with the token counts of each answer.

        histories: for each pair its earlier (question, answer) pairs, the oldest first; None: there are none.
        """
        if not isinstance(batch_size, int | np.integer):
            raise PromptError(f"batch_size is {brief(batch_size)}, but must be a whole number; give 1 or more.")
        if batch_size < 1:
            raise PromptError(f"batch_size is {batch_size}, but a batch has at least one row; give 1 or more.")
        if not isinstance(pairs, Iterable):
            raise PromptError(
                f"The batch must be a list of (image, question) pairs, not {type(pairs).__name__}; give such a list."
            )
        config = GenerationConfig.from_options(**generation)
        rows = [_pair(row, number) for number, row in enumerate(pairs, 1)]
        if histories is None:
            histories = [()] * len(rows)
        if len(histories) != len(rows):
            raise PromptError(f"There are {len(histories)} histories for {len(rows)} questions; give one for each.")
        prompts = [
            self.prompt(question, history=history, has_image=image is not None, language=language, config=config)
            for (image, question), history in zip(rows, histories, strict=True)
        ]
        replies: dict[int, Reply] = {}
        by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index].input_ids))
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            embeds = self.encode_images([image for image in (rows[index][0] for index in chosen) if image is not None])
            answers = self._answer([prompts[index] for index in chosen], embeds, config)
            replies.update(zip(chosen, answers, strict=True))
        return [replies[index] for index in range(len(rows))]

    def encode_image(self, image: ImageSource) -> ImageEmbeds:
        """Encode an image once; the result is accepted wherever an image is."""
        return self.encode_images([image])[0]

    def encode_images(self, images: Sequence[ImageSource]) -> list[ImageEmbeds]:
        """Encode several images in one pass; those encoded already are handed through."""
        for image in images:
            if isinstance(image, ImageEmbeds):
                self._check_embeds(image)
        fresh = [self._pixels(image) for image in images if not isinstance(image, ImageEmbeds)]
        encoded = iter(self.backend.encode_images(np.stack(fresh)) if fresh else ())
        return [image if isinstance(image, ImageEmbeds) else next(encoded) for image in images]

    def logits(
        self,
        input_ids: ArrayLike,
        pixels: ArrayLike | None = None,
        image_start: int | Sequence[int | None] | None = None,
    ) -> NDArray[np.float32]:
        """Logits float32 [batch, seq, vocab] of prompts given as ids.

        input_ids: int [batch, seq], left-padded, each row with `<sop>`; pixels: float32 [rows with an image, 3, S, S];
        image_start: column of the first image slot, one for all rows or one for each (None or -1: no image).
        """
        layout, embeds = self._from_ids(input_ids, pixels, image_start)
        return self.backend.logits(layout, embeds)

    def generate_ids(
        self,
        input_ids: ArrayLike,
        pixels: ArrayLike | None = None,
        image_start: int | Sequence[int | None] | None = None,
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        **generation: Any,
    ) -> list[list[int]]:
        """The new ids of each row, eos not included; arguments as for `logits`, options of `GenerationConfig`."""
        config = GenerationConfig.from_options(max_new_tokens=max_new_tokens, **generation)
        layout, embeds = self._from_ids(input_ids, pixels, image_start)
        return generate_ids(self.backend, layout, embeds, config)

    def prompt(
        self,
        question: str,
        *,
        history: Sequence[Turn] = (),
        has_image: bool,
        language: Language = "auto",
        config: GenerationConfig,
    ) -> Prompt:
        """The prompt for a question; tells in `dropped_turns` how much history did not fit."""
        return build_prompt(
            self.tokenizer,
            self.config,
            question,
            history=history,
            has_image=has_image,
            language=language,
            max_new_tokens=config.max_new_tokens,
        )

    def _start(
        self, prompts: Sequence[Prompt], embeds: Sequence[ImageEmbeds], config: GenerationConfig
    ) -> tuple[list[AnswerStream], Iterator[tuple[int, str]]]:
        streams = [AnswerStream(self.tokenizer, config.stop) for _ in prompts]
        return streams, answer_pieces(Decoding(self.backend, self._layout(prompts), embeds, config), streams)

    def _answer(
        self, prompts: Sequence[Prompt], embeds: Sequence[ImageEmbeds], config: GenerationConfig
    ) -> list[Reply]:
        texts = [""] * len(prompts)
        streams, pieces = self._start(prompts, embeds, config)
        for row, piece in pieces:
            texts[row] += piece
        return [
            Reply(text, len(prompt.input_ids), stream.new_tokens, prompt.dropped_turns)
            for text, stream, prompt in zip(texts, streams, prompts, strict=True)
        ]

    def _layout(self, prompts: Sequence[Prompt]) -> Layout:
        return pad_batch(
            [prompt.input_ids for prompt in prompts],
            [prompt.image_start for prompt in prompts],
            pad_token_id=self.config.text.pad_token_id,
            bos_token_id=self.config.text.bos_token_id,
        )

    def _pixels(self, image: str | Path | bytes | Image.Image | NDArray[Any]) -> NDArray[np.float32]:
        picture = load_image(image, self.image_limits, allow_urls=self.allow_urls)
        return preprocess(picture, self.config.vision.image_size)

    def _from_ids(
        self, input_ids: ArrayLike, pixels: ArrayLike | None, image_start: int | Sequence[int | None] | None
    ) -> tuple[Layout, list[ImageEmbeds]]:
        text, vision = self.config.text, self.config.vision
        ids = _array(input_ids, "input_ids")
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise PromptError(f"input_ids must be integers [batch, seq], not {ids.dtype} {list(ids.shape)}.")
        if ids.min() < 0 or ids.max() >= text.vocab_size:
            raise PromptError(f"input_ids must lie in 0 … {text.vocab_size - 1}; found {ids.min()} … {ids.max()}.")
        if ids.shape[1] > text.max_sequence_length:
            raise PromptError(
                f"input_ids have {ids.shape[1]} columns, but the model's window is {text.max_sequence_length}; "
                "shorten them."
            )
        layout = layout_from_ids(
            ids.astype(np.int64),
            pad_token_id=text.pad_token_id,
            bos_token_id=text.bos_token_id,
            image_start=image_start,
        )
        images = np.zeros((0, vision.in_channels, vision.image_size, vision.image_size), np.float32)
        if pixels is not None:
            images = _array(pixels, "pixels", np.float32)
        self._check_images(layout, images)
        return layout, self.backend.encode_images(images) if len(images) else []

    def _check_images(self, layout: Layout, images: NDArray[np.float32]) -> None:
        size, slots = self.config.vision.image_size, self.config.qformer.num_query_tokens
        expected = (int((layout.image_starts >= 0).sum()), self.config.vision.in_channels, size, size)
        if images.shape != expected:
            raise PromptError(
                f"pixels must be float32 {list(expected)} (one image for each row with an image_start), "
                f"not {list(images.shape)}."
            )
        last_start = layout.pad_lengths + layout.context_lengths - slots
        if ((layout.image_starts >= 0) & (layout.image_starts > last_start)).any():
            raise PromptError(f"image_start leaves no room for the {slots} image slots before <sop>; check its column.")

    def _check_embeds(self, image: ImageEmbeds) -> None:
        expected = (self.config.qformer.num_query_tokens, self.config.text.hidden_size)
        if image.array.shape != expected:
            raise ImageError(
                f"The encoded image is {list(image.array.shape)} and this model's are {list(expected)}: "
                "it was encoded by another model; encode it with this one."
            )


def _array(values: ArrayLike, name: str, dtype: type[np.generic] | None = None) -> NDArray[Any]:
    """`values` as a plain array in memory of its own order, which every backend takes."""
    try:
        return np.require(values, dtype, ["C", "W"])
    except (ValueError, TypeError) as error:
        raise PromptError(f"{name} cannot be read as an array ({error}); give one of numbers.") from error


def _pair(row: tuple[ImageSource | None, str], number: int) -> tuple[ImageSource | None, str]:
    if not isinstance(row, tuple | list) or len(row) != 2:
        raise PromptError(f"Row {number} of the batch is not a pair; give (image, question), with None for no image.")
    return row[0], row[1]
