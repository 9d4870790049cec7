"""How much memory a model takes, and how much there is."""

from pathlib import Path

import psutil
import pytest

from visualglm.config import VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.memory import (
    MemoryEstimate,
    available_memory,
    container_memory,
    estimate_lite_memory,
    estimate_memory,
    gib,
    gib_apart,
    require_memory,
)
from visualglm.parameters import parameter_count

GIB, MIB = 2**30, 2**20


def test_the_released_model():
    half, single = (estimate_memory(VisualGLMConfig(), dtype) for dtype in ("bfloat16", "float32"))
    assert half.weights == 2 * 7_802_193_408
    # Keys and values, layers, width, columns, bytes.
    assert half.kv_cache == 2 * 28 * 4096 * 2048 * 2
    assert (single.weights, single.kv_cache) == (2 * half.weights, 2 * half.kv_cache)
    assert estimate_memory(VisualGLMConfig(), "float16", batch_size=3).kv_cache == 3 * half.kv_cache
    assert str(half) == "16.0 GiB (weights 14.5 GiB, cache 896 MiB, work 601 MiB)"
    assert half.total == half.weights + half.kv_cache + half.working


def test_the_rotary_table_of_a_long_window_counts():
    text = VisualGLMConfig().text.model_copy(update={"max_sequence_length": 2**20})
    longer = estimate_memory(VisualGLMConfig(text=text), "float16")
    # Cosines and sines, columns, half a head's width, bytes.
    assert longer.working == 600 * MIB + 2 * 2**20 * 64 * 4


def test_a_small_model(tiny_config: VisualGLMConfig):
    assert estimate_memory(tiny_config, "float32").weights == 4 * parameter_count(tiny_config)


def test_an_export():
    """Weights as large as their files, and the cache in its own precision, if there is one."""
    config = VisualGLMConfig()
    single, half, whole = (estimate_lite_memory(config, 5 * GIB, kind) for kind in ("float32", "float16", "int8"))
    assert {estimate.weights for estimate in (single, half, whole)} == {5 * GIB}
    assert (single.kv_cache, half.kv_cache, whole.kv_cache) == (1792 * MIB, 896 * MIB, 448 * MIB)
    assert estimate_lite_memory(config, 5 * GIB, "int8", batch_size=3).kv_cache == 3 * whole.kv_cache
    assert estimate_lite_memory(config, 5 * GIB, None) == MemoryEstimate(5 * GIB, 0, single.working)
    assert single.working == estimate_memory(config, "float32").working


def test_what_does_not_fit_is_refused():
    estimate = MemoryEstimate(weights=10 * GIB, kv_cache=GIB, working=GIB)
    require_memory(estimate, 11 * GIB, "cpu")
    message = (
        "The model takes 12.0 GiB (weights 10.0 GiB, cache 1.0 GiB, work 1.0 GiB), but cuda:0 has 11.0 GiB left; "
        "close other programs, or load it in a smaller precision or on another machine."
    )
    with pytest.raises(DeviceError) as caught:
        require_memory(estimate, 11 * GIB - 1, "cuda:0")
    assert str(caught.value) == message


def test_sizes_as_people_read_them():
    assert [gib(size) for size in (0, 5 * MIB, GIB - MIB, GIB, 3 * GIB // 2)] == [
        "0 KiB", "5 MiB", "1023 MiB", "1.0 GiB", "1.5 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("needed", "left", "told"),
    [
        (2 * MIB, MIB, ("2 MiB", "1 MiB")),
        (MIB + 400_000, MIB, ("1.4 MiB", "1.0 MiB")),
        (GIB + 20 * MIB, GIB, ("1.02 GiB", "1.00 GiB")),
        (GIB + 1, GIB, ("1,073,741,825 bytes", "1,073,741,824 bytes")),
    ],
)
def test_what_does_not_suffice_is_less_in_print_too(needed: int, left: int, told: tuple[str, str]):
    assert gib_apart(needed, left) == told


def test_available_memory_is_some_of_the_machines():
    assert 0 < available_memory() <= psutil.virtual_memory().total


def write_cgroup(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{5 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon {3 * GIB}\nactive_file 0\ninactive_file {2 * GIB}\n")
    return folder


def test_a_containers_limit(tmp_path: Path):
    """Files that were only read are given up first, so they do not count as used."""
    assert container_memory(write_cgroup(tmp_path, str(8 * GIB))) == 5 * GIB


def test_no_limit(tmp_path: Path):
    assert container_memory(tmp_path / "no" / "cgroup") == float("inf")
    assert container_memory(write_cgroup(tmp_path, "max")) == float("inf")
