import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visualglm.backends.base import ImageEmbeds
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import DataError, ImageError
from visualglm.processing.image import load_image, preprocess
from visualglm.training.image_cache import Encode, ImageCache

FINGERPRINT = "ab" * 32
Floats = NDArray[np.float32]


class Encoder:
    """Embeddings that depend on the pixels, and how often they were asked for."""

    def __init__(self, config: VisualGLMConfig, scale: float = 1.0) -> None:
        shape = (config.qformer.num_query_tokens, config.text.hidden_size)
        self.weight = np.random.default_rng(0).normal(size=(3 * config.vision.image_size**2, *shape)) * scale
        self.asked: list[int] = []

    def __call__(self, pixels: Floats) -> Sequence[ImageEmbeds]:
        self.asked.append(len(pixels))
        embeds = np.einsum("if,fqw->iqw", pixels.reshape(len(pixels), -1), self.weight).astype(np.float32)
        return [ImageEmbeds(one) for one in embeds]


@pytest.fixture
def encoder(tiny_config: VisualGLMConfig) -> Encoder:
    return Encoder(tiny_config, 0.02)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20 + number, 30), (50 * number, 20, 200)).save(path)
    return paths


@pytest.fixture
def open_cache(tmp_path: Path, tiny_config: VisualGLMConfig) -> Callable[..., ImageCache]:
    def open_it(fingerprint: str = FINGERPRINT, dtype: DType = "float32") -> ImageCache:
        return ImageCache(tmp_path / "cache", tiny_config, fingerprint, dtype)

    return open_it


def entries(cache: ImageCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-3)])
def test_embeddings_are_those_that_were_computed(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder, dtype: DType, tolerance: float
) -> None:
    cache = open_cache(dtype=dtype)
    reports: list[tuple[int, int]] = []
    assert cache.fill(images, encoder, batch_size=2, report=lambda *done: reports.append(done)) == 5
    assert encoder.asked == [2, 2, 1] and reports == [(2, 5), (4, 5), (5, 5)]
    for image in images:
        expected = encoder(preprocess(load_image(image), 28)[None])[0].array
        found = open_cache(dtype=dtype).read(image)
        assert found.dtype == np.float32 and found.shape == (4, 32)
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
    assert {path.stat().st_size for path in entries(cache)} == {cache.entry_bytes}


def test_what_bfloat16_holds_is_kept_to_the_bit(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder
) -> None:
    def encode(pixels: Floats) -> Sequence[ImageEmbeds]:
        bits = np.stack([embeds.array for embeds in encoder(pixels)]).view(np.uint32) & 0xFFFF0000
        return [ImageEmbeds(one) for one in bits.view(np.float32)]

    cache = open_cache(dtype="bfloat16")
    cache.fill(images[:1], encode)
    np.testing.assert_array_equal(cache.read(images[0]), encode(preprocess(load_image(images[0]), 28)[None])[0].array)


def test_an_image_takes_256_kib_at_full_size(tmp_path: Path) -> None:
    assert ImageCache(tmp_path, VisualGLMConfig(), FINGERPRINT, "bfloat16").entry_bytes == 256 * 1024 + 4


def test_an_image_is_computed_once_for_its_content(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(images[0].read_bytes())
    cache = open_cache()
    assert cache.fill([images[0], copy, images[0]], encoder) == 1
    assert open_cache().fill([copy], encoder) == 0
    np.testing.assert_array_equal(cache.read(images[0]), open_cache().read(copy))
    assert encoder.asked == [1] and len(entries(cache)) == 1


def test_another_model_or_precision_is_another_cache(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder
) -> None:
    open_cache().fill(images, encoder)
    for other in (open_cache("cd" * 32), open_cache(dtype="bfloat16")):
        assert other.missing(images) == images


def test_a_changed_image_is_another_image(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder
) -> None:
    cache = open_cache()
    cache.fill(images, encoder)
    before = cache.read(images[0])
    images[0].write_bytes(images[3].read_bytes())
    np.testing.assert_array_equal(cache.read(images[0]), cache.read(images[3]))
    assert not np.array_equal(cache.read(images[0]), before)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entries_are_noticed_and_made_again(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder, damage: Callable[[bytes], bytes]
) -> None:
    cache = open_cache()
    cache.fill(images[2:3], encoder)
    expected = cache.read(images[2])
    (entry,) = entries(cache)
    cache.fill(images, encoder)
    entry.write_bytes(damage(entry.read_bytes()))
    with pytest.raises(ImageError, match=r"2\.png are not in .*, or are damaged; start again"):
        cache.read(images[2])
    assert cache.missing(images) == [images[2]]
    assert open_cache().fill(images, encoder) == 1
    np.testing.assert_array_equal(cache.read(images[2]), expected)


def _fill(folder: Path, config: VisualGLMConfig, images: list[Path]) -> int:
    return ImageCache(folder, config, FINGERPRINT, "float32").fill(images, Encoder(config), batch_size=1)


def test_processes_may_fill_it_at_once(tmp_path: Path, tiny_config: VisualGLMConfig, images: list[Path]) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        filling = [pool.submit(_fill, tmp_path / "cache", tiny_config, images) for _ in range(3)]
        assert all(0 <= task.result() <= 5 for task in filling)
    cache = ImageCache(tmp_path / "cache", tiny_config, FINGERPRINT, "float32")
    assert cache.missing(images) == [] and len(entries(cache)) == 5


# --- faults -----------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_read(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder
) -> None:
    cache = open_cache()
    with pytest.raises(ImageError, match=r"0\.png are not in .* start again"):
        cache.read(images[0])
    images[1].write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"1\.png is not an image"):
        cache.fill(images, encoder)
    images[1].unlink()
    with pytest.raises(ImageError, match=r"1\.png cannot be read \(No such file or directory\)"):
        cache.fill(images, encoder)


def test_embeddings_that_overflow_are_not_kept(
    open_cache: Callable[..., ImageCache], images: list[Path], tiny_config: VisualGLMConfig
) -> None:
    huge: Encode = Encoder(tiny_config, 1e5)
    cache = open_cache(dtype="float16")
    with pytest.raises(DataError, match=r"0\.png are not finite in float16; train with run\.precision: float32\.$"):
        cache.fill(images, huge)
    assert entries(cache) == []


def test_a_disk_without_room(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()
    with monkeypatch.context() as patch:
        patch.setattr("visualglm.training.image_cache.disk_usage", lambda _: SimpleNamespace(free=2000))
        with pytest.raises(DataError, match=r"of 5 images take 3 KiB, but .* has 2 KiB free; set VISUALGLM_CACHE to"):
            cache.fill(images, encoder)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match=r"cannot be kept in .* \(the disk is full\); set VISUALGLM_CACHE to a"):
            cache.fill(images, encoder)
    assert entries(cache) == []


def test_a_folder_that_cannot_be_made(
    open_cache: Callable[..., ImageCache], images: list[Path], encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"cannot be kept in .* \(Not a directory\); set VISUALGLM_CACHE"):
        open_cache().fill(images, encoder)
