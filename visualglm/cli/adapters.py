"""What an adapter is, in rows of a table."""

from __future__ import annotations

from math import prod

from visualglm.checkpoint.adapter_dir import AdapterDirectory
from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import readable

Row = tuple[str, str]


def adapter_facts(adapter: AdapterDirectory) -> list[Row]:
    """What it holds, and which model it belongs to."""
    return [("adapter", str(adapter.path)), *_lora(adapter), *_parts(adapter), ("base", base_of(adapter))]


def _lora(adapter: AdapterDirectory) -> list[Row]:
    if not adapter.lora:
        return []
    pairs = adapter.lora.values()
    ranks = " and ".join(str(rank) for rank in sorted({pair.rank for pair in pairs}))
    scales = " and ".join(f"{scale:g}" for scale in sorted({pair.scale for pair in pairs}))
    count = sum(prod(tensor.shape) for pair in pairs for tensor in (pair.a, pair.b))
    return [
        ("LoRA", f"{len(pairs)} layers, rank {ranks}, scale {scales}, {count:,} parameters"),
        ("", listed(list(adapter.lora))),
    ]


def _parts(adapter: AdapterDirectory) -> list[Row]:
    rows = []
    if adapter.trained:
        parts = sorted({name.partition(".")[0] for name in adapter.trained})
        count = sum(prod(tensor.shape) for tensor in adapter.trained.values())
        rows.append(("trained", f"{count:,} parameters in place of the model's, in {listed(parts)}"))
    if adapter.prefix:
        length = next(iter(adapter.prefix.values())).shape[2:3]
        rows.append(("prefixes", f"of {length[0] if length else 0} learned keys and values in every layer; torch only"))
    return rows


def base_of(adapter: AdapterDirectory) -> str:
    """The model that it belongs to, in words."""
    manifest = adapter.manifest
    if manifest is None or manifest.base_fingerprint is None:
        return "not known: taken by any model that it fits"
    return f"{readable(manifest.base_name or 'unknown')}, fingerprint {manifest.base_fingerprint}"
