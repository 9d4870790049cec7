"""Embeddings of images on disk, for training whose ViT and Q-Former stay as they are: computed once for all epochs."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import disk_usage

import numpy as np
from numpy.typing import NDArray

from visualglm import __version__
from visualglm.backends.base import ImageEmbeds
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import DISK_FULL, DataError, ImageError
from visualglm.export_cache import CACHE_VARIABLE
from visualglm.memory import gib_apart
from visualglm.processing.image import load_image, preprocess
from visualglm.training.rows import Report

Encode = Callable[[NDArray[np.float32]], Sequence[ImageEmbeds]]
"""Pixels [images, 3, S, S] → one `ImageEmbeds` an image, as `Backend.encode_images`."""

_THREADS = 4
_CHECKSUM_BYTES = 4
_REMEDY = f"set {CACHE_VARIABLE} to a folder that has room, or train with data.cache_images: false"


class ImageCache:
    """One file an image, named by the hash of its content, in a folder for the model and precision that computed it.

    folder: where the caches of all models lie, such as `export_cache.cache_folder() / "images"`
    fingerprint: of the model
    dtype: in which the embeddings are computed; they are kept in float32, or in float16 if that is half precision
    Any number of processes may fill and read it at once: a file appears whole, and who comes second replaces it by the
    same.
    """

    def __init__(self, folder: Path, config: VisualGLMConfig, fingerprint: str, dtype: DType) -> None:
        self.folder = folder / f"{fingerprint[:24]}-{dtype}-{__version__}"
        self._image_size = config.vision.image_size
        self._shape = (config.qformer.num_query_tokens, config.text.hidden_size)
        # Of bfloat16, float16 keeps every bit in the range that embeddings have.
        self._dtype = np.dtype("<f4" if dtype == "float32" else "<f2")
        self._keys: dict[Path, tuple[int, int, str]] = {}

    @property
    def entry_bytes(self) -> int:
        """What an image takes on disk."""
        return int(np.prod(self._shape)) * self._dtype.itemsize + _CHECKSUM_BYTES

    def read(self, image: Path) -> NDArray[np.float32]:
        """Embeddings [queries, text width] of an image; raises `ImageError` if they are not there or damaged."""
        embeds = self._entry(self._key(image))
        if embeds is None:
            raise ImageError(
                f"The embeddings of the image {image} are not in {self.folder}, or are damaged; start again, which "
                "computes what is missing."
            )
        return embeds

    def missing(self, images: Iterable[Path]) -> list[Path]:
        """Those of `images` that have no entry, or a damaged one; each content once. Raises `ImageError`."""
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(images)
            by_content = dict(zip(pool.map(self._key, images), images, strict=True))
            whole = pool.map(self._is_whole, by_content)
            return [image for image, is_whole in zip(by_content.values(), whole, strict=True) if not is_whole]

    def fill(self, images: Iterable[Path], encode: Encode, *, batch_size: int = 8, report: Report | None = None) -> int:
        """Compute what is missing; returns how many.

        Raises `ImageError` for an image that cannot be read, `DataError` if the embeddings cannot be kept.
        """
        missing = self.missing(images)
        if not missing:
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._require_space(len(missing))
            with ThreadPoolExecutor(_THREADS) as pool:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    pixels = np.stack(list(pool.map(self._pixels, batch)))
                    for image, embeds in zip(batch, encode(pixels), strict=True):
                        self._write(image, embeds.array)
                    if report:
                        report(start + len(batch), len(missing))
        except OSError as error:
            reason = "the disk is full" if error.errno in DISK_FULL else error.strerror
            raise DataError(f"Embeddings of images cannot be kept in {self.folder} ({reason}); {_REMEDY}.") from error
        return len(missing)

    def _key(self, image: Path) -> str:
        """The hash of an image's content, computed again if the file has changed."""
        try:
            status = image.stat()
            known = self._keys.get(image)
            if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
                with open(image, "rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                known = self._keys[image] = (status.st_size, status.st_mtime_ns, sha256)
        except OSError as error:
            raise ImageError(f"The image {image} cannot be read ({error.strerror}); check the path.") from error
        return known[2]

    def _place(self, key: str) -> Path:
        # A folder of hundreds of thousands of files is slow on many systems.
        return self.folder / key[:2] / key

    def _entry(self, key: str) -> NDArray[np.float32] | None:
        """What is kept under `key`; None if there is nothing, or it is not what was written."""
        try:
            data = self._place(key).read_bytes()
        except OSError:
            return None
        checksum, values = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
        if len(data) != self.entry_bytes or _checksum(values) != checksum:
            return None
        return np.frombuffer(values, self._dtype).reshape(self._shape).astype(np.float32)

    def _is_whole(self, key: str) -> bool:
        return self._entry(key) is not None

    def _pixels(self, image: Path) -> NDArray[np.float32]:
        return preprocess(load_image(image), self._image_size)

    def _require_space(self, entries: int) -> None:
        needed, free = entries * self.entry_bytes, disk_usage(self.folder).free
        if needed > free:
            takes, left = gib_apart(needed, free)
            raise DataError(
                f"The embeddings of {entries} images take {takes}, but {self.folder} has {left} free; {_REMEDY}."
            )

    def _write(self, image: Path, embeds: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore"):
            kept = embeds.astype(self._dtype)
        if not np.isfinite(kept).all():
            raise DataError(
                f"The embeddings of the image {image} are not finite in {self._dtype.name}; "
                "train with run.precision: float32."
            )
        place = self._place(self._key(image))
        place.parent.mkdir(exist_ok=True)
        values = kept.tobytes()
        # Not brought down to the disk one by one, which takes long: what a power cut leaves is found to be damaged.
        descriptor, partial = tempfile.mkstemp(dir=place.parent, prefix=".")
        try:
            with open(descriptor, "wb") as file:
                file.write(_checksum(values) + values)
            os.replace(partial, place)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def _checksum(values: bytes) -> bytes:
    return zlib.crc32(values).to_bytes(_CHECKSUM_BYTES, "little")
