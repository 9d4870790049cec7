"""What an export is to be, as the caller gives it, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from visualglm.checkpoint.lite_dir import LiteForm, Precision
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.export.packed_weight import Bits
from visualglm.export.rounding import LAYER_KINDS, RoundingMethod
from visualglm.memory import CacheType

BITS: dict[Precision, Bits] = {"int4": 4, "int8": 8}
"""Of the precisions that are rounded to."""
# As large as keeps an export of the full size fast; narrow layers would lose too much by it. With 8 bits larger ones
# lose hardly anything, and batches are a sixth faster for them; with 4 they would gain nothing.
_BLOCK_SIZE: dict[Bits, int] = {4: 128, 8: 512}
_SMALL_BLOCK_SIZE, _WIDE = 32, 1024
# Those that MatMulNBits has.
_BLOCK_SIZES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ExportOptions:
    """What an export is to be.

    precision: of the decoder's linear layers; with int4 and int8 those of the image encoder and the token embeddings
    are int8. use_past: False leaves the KV cache out. block_size: weights that share a scale (None: 128 of 4 bits or
    512 of 8, in narrow models 32). kv_cache: how keys and values are kept (auto: int8 where the weights are whole
    numbers). method: how weights are rounded, see `quantize_blocks` and `gptq`. int8_layers: kinds of layers that keep
    8 bits with int4. calibration: a JSONL file of rows that gptq learns from, and the export is judged by; the built-in
    model has drawn scenes. evaluate: by how many scenes or rows it is judged (None: 100, where there are any).
    """

    precision: Precision = "int8"
    use_past: bool = True
    block_size: int | None = None
    kv_cache: Literal["auto", "float32", "int8"] = "auto"
    method: RoundingMethod = "search"
    int8_layers: tuple[str, ...] = ()
    calibration: Path | None = None
    evaluate: int | None = 0

    def form(self, config: VisualGLMConfig) -> LiteForm:
        """The options with all that is left open decided; raises `ConfigError` if they contradict one another."""
        rounds = self.precision in BITS
        if not rounds:
            self._check_nothing_is_rounded()
        elif self.block_size is not None and self.block_size not in _BLOCK_SIZES:
            sizes = ", ".join(map(str, _BLOCK_SIZES))
            raise ConfigError(f"Blocks of {self.block_size} weights cannot be run; give {sizes}.")
        self._check_int8_layers()
        if not self.use_past and self.kv_cache != "auto":
            raise ConfigError(f"An export without a KV cache has none of {self.kv_cache}; leave one of the two out.")
        if self.precision == "fp16" and self.kv_cache != "auto":
            raise ConfigError(f"An fp16 export has a float16 cache, not {self.kv_cache}; leave the choice out.")
        return LiteForm(
            precision=self.precision,
            kv_cache=self._cache_type(rounds),
            use_past=self.use_past,
            block_size=(self.block_size or self._default_block_size(config)) if rounds else None,
            int8_layers=self.int8_layers,
            onnxruntime_version=_onnxruntime_version(),
        )

    def _default_block_size(self, config: VisualGLMConfig) -> int:
        return _BLOCK_SIZE[BITS[self.precision]] if config.text.hidden_size >= _WIDE else _SMALL_BLOCK_SIZE

    def _check_nothing_is_rounded(self) -> None:
        if self.block_size is not None:
            raise ConfigError(
                f"Blocks of {self.block_size} are for int4 and int8; leave them out for {self.precision}."
            )
        if self.method == "gptq" or self.calibration is not None or self.evaluate:
            raise ConfigError(
                f"Nothing is rounded with {self.precision}, so that there is nothing to calibrate or to judge; "
                "leave those options out, or give int4 or int8."
            )

    def _check_int8_layers(self) -> None:
        for kind in self.int8_layers:
            if kind not in LAYER_KINDS:
                raise ConfigError(f"There are no layers named {kind!r}; give some of {', '.join(LAYER_KINDS)}.")
        if self.int8_layers and self.precision != "int4":
            raise ConfigError(
                f"Layers in 8 bits are an exception from int4, but the precision is {self.precision}; leave them out."
            )

    def _cache_type(self, rounds: bool) -> CacheType:
        if self.kv_cache != "auto":
            return self.kv_cache
        return "int8" if rounds else "float16" if self.precision == "fp16" else "float32"


def _onnxruntime_version() -> str | None:
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return None
