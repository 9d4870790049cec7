"""Options that commands share, each defined once: a dataclass a group, whose fields become options of the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from typer import Option
from typer.models import ParameterInfo

from visualglm.config import TextConfig
from visualglm.errors import ConfigError
from visualglm.generation.config import DEFAULT_MAX_NEW_TOKENS, GenerationConfig
from visualglm.loading import BackendName, DTypeName
from visualglm.processing.image import DEFAULT_LIMITS, ImageLimits
from visualglm.processing.prompt import Language

_MODEL, _GENERATION, _IMAGES = "Model", "Answers", "Images"

Quiet = Annotated[bool, Option("--quiet", "-q", help="Tell nothing but results and errors.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model is loaded, and where to."""

    model: Annotated[
        Path | None,
        Option("--model", "-m", metavar="DIR", help="Model directory; else the built-in.", rich_help_panel=_MODEL),
    ] = None
    backend: Annotated[
        BackendName, Option(help="What computes; auto: onnx on a CPU, torch on a GPU.", rich_help_panel=_MODEL)
    ] = "auto"
    device: Annotated[
        str,
        Option(
            metavar="NAME",
            help="auto, cpu, cuda, cuda:1; torch: mps, npu; onnx: cann; mindspore: ascend.",
            rich_help_panel=_MODEL,
        ),
    ] = "auto"
    device_id: Annotated[
        int | None, Option(metavar="N", min=0, help="Which of them: 1 is as cuda:1.", rich_help_panel=_MODEL)
    ] = None
    dtype: Annotated[
        DTypeName,
        Option(help="Precision; auto: exact for small models; else int8, on a GPU as stored.", rich_help_panel=_MODEL),
    ] = "auto"
    adapter: Annotated[
        list[str] | None,
        Option(
            "--adapter",
            metavar="DIR",
            help="What fine-tuning made of the model; chat takes several, as DIR or NAME=DIR.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    graph_mode: Annotated[
        int | None,
        Option(
            metavar="0|1",
            min=0,
            max=1,
            help="mindspore: 0 compiles graphs, 1 runs operators one by one; else 0.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    quiet: Quiet = False

    def runtime(self) -> dict[str, Any]:
        """What computes, as `choose` takes it; raises `ConfigError` if the device is told in two ways."""
        device = self.device.lower()
        if self.device_id is not None:
            if (device == "auto" and self.backend != "mindspore") or ":" in device:
                raise ConfigError(
                    f"--device-id is {self.device_id} and --device is {device}; name the device, such as cuda or "
                    "ascend, without a number."
                )
            device = f"{device}:{self.device_id}"
        return {"backend": self.backend, "device": device, "dtype": self.dtype, "graph_mode": self.graph_mode}


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are made; greedy unless told to sample."""

    max_new_tokens: Annotated[
        int | None,
        Option(
            metavar="N",
            help=f"Longest answer in tokens; else {DEFAULT_MAX_NEW_TOKENS}, or half the window if that is less.",
            rich_help_panel=_GENERATION,
        ),
    ] = None
    temperature: Annotated[
        float | None, Option(metavar="T", help="Draw at random: 0.8 a little, 1 freely.", rich_help_panel=_GENERATION)
    ] = None
    top_k: Annotated[
        int, Option(metavar="N", help="Draw among the N likeliest; 0: no limit.", rich_help_panel=_GENERATION)
    ] = 0
    top_p: Annotated[
        float, Option(metavar="P", help="Draw among the likeliest of share P; 1: all.", rich_help_panel=_GENERATION)
    ] = 1.0
    repetition_penalty: Annotated[
        float, Option(metavar="X", help="Above 1: less of what was said.", rich_help_panel=_GENERATION)
    ] = 1.0
    seed: Annotated[int | None, Option(metavar="N", help="Makes a draw repeatable.", rich_help_panel=_GENERATION)] = (
        None
    )
    stop: Annotated[
        list[str] | None,
        Option(metavar="TEXT", help="End the answer before TEXT; may be repeated.", rich_help_panel=_GENERATION),
    ] = None
    language: Annotated[
        Language, Option(help="Template of the prompt; auto goes by the question.", rich_help_panel=_GENERATION)
    ] = "auto"
    mindformers: Annotated[
        Path | None,
        Option(
            "--config",
            "--config_path",
            metavar="YAML",
            help="Take these options from a prediction YAML of MindFormers, where they are not given.",
            rich_help_panel=_GENERATION,
        ),
    ] = None

    def fitted(self, text: TextConfig) -> GenerationOptions:
        """These options with a longest answer that fits the model's window; raises `ConfigError` if it does not."""
        window = text.max_sequence_length
        if self.max_new_tokens is None:
            # Not by the question: the answer to a row must not depend on the rows beside it.
            return replace(self, max_new_tokens=min(DEFAULT_MAX_NEW_TOKENS, window // 2))
        if self.max_new_tokens >= window:
            raise ConfigError(
                f"--max-new-tokens is {self.max_new_tokens:,}, but the model's window of {window:,} tokens has to "
                "hold the question too; give less."
            )
        return self

    def keywords(self) -> dict[str, Any]:
        """As the methods of `VisualGLM` take them."""
        given = asdict(self) | {"stop": tuple(self.stop or ())}
        del given["mindformers"]
        if self.max_new_tokens is None:
            del given["max_new_tokens"]
        return given

    def config(self) -> GenerationConfig:
        """The validated options; raises `ConfigError`."""
        options = self.keywords()
        del options["language"]
        return GenerationConfig.from_options(**options)


@dataclass(frozen=True)
class ImageOptions:
    """What an image may be and cost."""

    allow_urls: Annotated[
        bool, Option("--allow-urls", help="Fetch images that are given as http(s) URLs.", rich_help_panel=_IMAGES)
    ] = False
    max_image_pixels: Annotated[
        int, Option(metavar="N", min=1, help="Largest image in pixels.", rich_help_panel=_IMAGES)
    ] = DEFAULT_LIMITS.max_pixels
    max_image_bytes: Annotated[int, Option(metavar="N", min=1, help="Largest image file.", rich_help_panel=_IMAGES)] = (
        DEFAULT_LIMITS.max_bytes
    )

    def limits(self) -> ImageLimits:
        return ImageLimits(max_pixels=self.max_image_pixels, max_bytes=self.max_image_bytes)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as Typer shall see it: each of its parameters that is a dataclass spread into the fields of that."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

    @wraps(command)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    parameters = [
        option
        for name, parameter in signature(command).parameters.items()
        for option in (_options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])])
    ]
    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    for parameter in parameters:
        kind, *given = get_args(parameter.annotation) or [None]
        if kind in (Path, Path | None):
            _read_paths(*given)
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _read_paths(*given: object) -> None:
    """Let a path be read by us: Typer takes an empty one for the current folder, and explains how to use the command
    where what reads the path says it in a sentence."""
    for info in given:
        if isinstance(info, ParameterInfo):
            info.parser = _path_reader(info.metavar)


def _path_reader(metavar: str | None) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if not text:
            raise ConfigError(f"The path {metavar} is empty; give one, or . for the current folder.")
        return Path(text)

    return path


def _options(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
