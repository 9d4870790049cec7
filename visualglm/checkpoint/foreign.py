"""What the formats of SAT and Hugging Face have in common: state dicts under other names, and a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm.checkpoint.checks import check_tensors
from visualglm.checkpoint.contents import Checkpoint, main_dtype
from visualglm.checkpoint.foreign_config import ConfigStyle, config_from_foreign, config_to_foreign
from visualglm.checkpoint.keys import STRAY_NAMES, KeyStyle, packed, unpacked
from visualglm.checkpoint.manifest import Layout, Source
from visualglm.checkpoint.model_dir import license_of
from visualglm.checkpoint.rotary import check_rotary, rotary_tensor
from visualglm.checkpoint.tensors import Tensor
from visualglm.checkpoint.weights_license import WEIGHTS_LICENSE
from visualglm.parameters import parameter_shapes

TOKENIZER = "ice_text.model"


@dataclass(frozen=True)
class ForeignFormat:
    """A format by its name and its conventions."""

    name: str
    keys: KeyStyle
    config: ConfigStyle

    def adopt(self, path: Path, values: dict[str, Any], found: Mapping[str, Tensor], layout: Layout) -> Checkpoint:
        """The checkpoint in folder `path`, of its configuration `values` and all tensors `found`.

        Raises `CheckpointError` if the two do not fit, or the model is not one we compute as the original does.
        """
        config = config_from_foreign(values, self.config, "float16", str(path / self.config.file_name))
        rotary_names = self.keys.rotary_names(config.text)
        extras = {name: found[name] for name in (*rotary_names, *STRAY_NAMES) if name in found}
        shapes = parameter_shapes(config)
        expected = {self.keys.name(name): shape for name, shape in shapes.items()}
        check_tensors(path, found, expected | {name: tensor.shape for name, tensor in extras.items()})
        check_rotary(path, {name: extras[name] for name in rotary_names if name in extras}, config.text)
        tensors = {name: found[self.keys.name(name)] for name in shapes}
        return Checkpoint(
            config=config.model_copy(update={"dtype": main_dtype(tensors)}),
            tensors=unpacked(tensors, config.text, layout),
            source=Source(format=self.name, layout=layout, config=values),
            extras=extras,
            tokenizer_path=path / TOKENIZER if (path / TOKENIZER).exists() else None,
            # One that lies there was written when a model was converted back, which need not be THUDM's.
            license_text=license_of(path) or WEIGHTS_LICENSE,
        )

    def foreign_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The configuration to write: the original one for a checkpoint that came from this format."""
        original = checkpoint.source.config if checkpoint.source.format == self.name else None
        return config_to_foreign(checkpoint.config, self.config, original)

    def foreign_tensors(self, checkpoint: Checkpoint, layout: Layout) -> dict[str, Tensor]:
        """The state dict to write: all that came from this format, or what its readers look for."""
        tensors = packed(checkpoint.tensors, checkpoint.config.text, layout)
        named = {self.keys.name(name): tensor for name, tensor in tensors.items()}
        return {**named, **self._foreign_extras(checkpoint)}

    def dropped(self, checkpoint: Checkpoint) -> list[str]:
        """Extras of another format that have no place in this one."""
        if checkpoint.source.format == self.name or self.keys.keeps_stray:
            return []
        return [name for name in STRAY_NAMES if name in checkpoint.extras]

    def _foreign_extras(self, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        if checkpoint.source.format == self.name:
            return checkpoint.extras
        stored = [tensor for name, tensor in checkpoint.extras.items() if name not in STRAY_NAMES]
        text = checkpoint.config.text
        frequencies = stored[0] if stored else rotary_tensor(text, checkpoint.config.dtype)
        stray = checkpoint.extras.keys() & STRAY_NAMES if self.keys.keeps_stray else ()
        return dict.fromkeys(self.keys.rotary_names(text), frequencies) | {
            name: checkpoint.extras[name] for name in stray
        }
