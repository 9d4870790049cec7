"""Images from files, bytes, arrays or data URLs: bounded before they are decoded, then RGB, then the model's pixels."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visualglm.errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_FORMAT_NAMES = "JPEG, PNG, WebP, BMP or GIF"
_MAGIC = re.compile(rb"\xff\xd8|\x89PNG|RIFF....WEBP|BM|GIF8", re.DOTALL)
_FOREIGN_FORMATS = (
    (re.compile(rb"version https://git-lfs"), "a git-lfs pointer, not the image it points to; run `git lfs pull`"),
    (re.compile(rb"....ftyp(hei|hev|mif|msf|avi)", re.DOTALL), "a HEIC or AVIF image; save it as JPEG or PNG"),
)
# What Pillow's decoders are known to raise on damaged files; `OSError` covers `UnidentifiedImageError`.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost: pixels once decoded, bytes before that, seconds to fetch it from a URL."""

    max_pixels: int = 2**26
    max_bytes: int = 2**26
    fetch_seconds: float = 10.0


DEFAULT_LIMITS = ImageLimits()


def load_image(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS, *, allow_urls: bool = False) -> Image.Image:
    """An upright RGB image from a path, encoded bytes, a PIL image, a uint8 array or a `data:` URL.

    Arrays are [H, W], [H, W, 3] or [H, W, 4]. Alpha is dropped, not composited; of an animation the first frame is
    taken. `http(s)` URLs are fetched only with `allow_urls`. Raises `ImageError`.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "The PIL image", limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "The image", limits)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decode(_data_url_bytes(source, limits), "The image in the data: URL", limits)
    if isinstance(source, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)):
        return _decode(_url_bytes(source, scheme[1], limits, allow_urls), f"The image at {_short(source)}", limits)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        if not path:
            raise ImageError("The path of the image is empty; give the path of one image.")
        return _decode(_file_bytes(path, limits), f"The image {_short(path)}", limits)
    raise ImageError(
        f"An image cannot be made from {type(source).__name__}; "
        "give a path, encoded bytes, a PIL image, a uint8 array or a data: URL."
    )


def check_image(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Raises `ImageError` where `load_image` would; quicker, as a JPEG is decoded at an eighth of its size."""
    name = f"The image {_short(str(path))}"
    image = _opened(_file_bytes(str(path), limits), name, limits)
    _check_pixels(image.width, image.height, name, limits)
    image.draft(None, (1, 1))
    _finish(image, name, limits)


def preprocess(image: Image.Image, size: int) -> NDArray[np.float32]:
    """Pixels for the ViT, float32 [3, size, size]: resized bicubically, scaled to 0…1, normalised by MEAN and STD."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    scaled = np.asarray(resized, np.uint8).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    return np.ascontiguousarray((scaled - mean) / std)


def _file_bytes(path: str, limits: ImageLimits) -> bytes:
    name = f"The image {_short(path)}"
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise ImageError(f"{name} is {kind}, not a file; give the path of one image.")
        _check_bytes(status.st_size, name, limits)
        with open(path, "rb") as file:
            return file.read(limits.max_bytes + 1)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist; check the path.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{name} cannot be read ({reason}); check the path.") from error


def _data_url_bytes(url: str, limits: ImageLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ImageError("The data: URL is not of the form data:image/…;base64,…; encode the image in base64.")
    _check_bytes(len(payload) * 3 // 4 - 2, "The image in the data: URL", limits)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"The data: URL is not valid base64 ({error}); encode the image again.") from error


def _url_bytes(url: str, scheme: str, limits: ImageLimits, allow_urls: bool) -> bytes:
    if scheme.lower() not in ("http", "https") or not url.isprintable():
        raise ImageError(f"The image at {_short(url)} is no http(s) address; give a path, a data: URL or image bytes.")
    if not allow_urls:
        raise ImageError(
            f"The image at {_short(url)} was not fetched, because URLs are not allowed; "
            "download it and give its path, or allow URLs."
        )
    # HTTP takes a while to import, and most images are files.
    from visualglm.processing.fetch import fetch

    return fetch(url, limits.max_bytes, limits.fetch_seconds)


def _from_array(array: NDArray[np.uint8], limits: ImageLimits) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"The image array has shape {list(array.shape)} and dtype {array.dtype}; "
            "give uint8 of shape [H, W], [H, W, 3] or [H, W, 4]."
        )
    _check_pixels(array.shape[1], array.shape[0], "The image array", limits)
    return Image.fromarray(np.ascontiguousarray(array[..., :3] if array.ndim == 3 else array)).convert("RGB")


def _decode(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    return _finish(_opened(data, name, limits), name, limits)


def _opened(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    """The image with only its header read."""
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); give a {_FORMAT_NAMES} image.")
    _check_bytes(len(data), name, limits)
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except _BOMBS as error:
        raise _bomb(name, error, limits) from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} is {_what_instead(data)}.") from error


def _what_instead(data: bytes) -> str:
    for pattern, what in _FOREIGN_FORMATS:
        if pattern.match(data):
            return what
    if _MAGIC.match(data):
        return "damaged or cut short; save or download it again"
    return f"not an image this program reads; give a {_FORMAT_NAMES} image"


def _finish(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    """Check the size that the header tells, then decode, turn upright and convert."""
    _check_pixels(image.width, image.height, name, limits)
    try:
        image.load()
        turn = _UPRIGHT_BY.get(_orientation(image))
        rgb = _to_rgb(image, name)
        return rgb if turn is None else rgb.transpose(turn)
    except _BOMBS as error:
        raise _bomb(name, error, limits) from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} is damaged or cut short ({error}); save or download it again.") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; damaged EXIF data does not make an image unreadable."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DECODER_ERRORS:
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey to white; the high byte is what it keeps of 16-bit colour.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point values; convert it to RGB first.")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageError(f"{name} has more than the {limits.max_bytes} bytes allowed; make it smaller.")


def _check_pixels(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}×{height} and has no pixels; give an image of at least 1×1.")
    if width * height > limits.max_pixels:
        raise _too_many_pixels(name, f"{width}×{height} pixels", limits)


def _bomb(name: str, error: Exception, limits: ImageLimits) -> ImageError:
    """Pillow's own refusal, from the header too; it tells the number of pixels and its limit."""
    figures = [int(figure) for figure in re.findall(r"\d+", str(error))]
    pixels, pillow_limit = figures if len(figures) == 2 else ("too many", limits.max_pixels)
    return _too_many_pixels(name, f"{pixels} pixels", replace(limits, max_pixels=min(limits.max_pixels, pillow_limit)))


def _too_many_pixels(name: str, what: str, limits: ImageLimits) -> ImageError:
    return ImageError(f"{name} has {what}, over the limit of {limits.max_pixels} pixels; make it smaller.")


def _short(text: str) -> str:
    """A path or URL fit to be shown in one line."""
    shown = "".join(character if character.isprintable() else "?" for character in text[:200])
    return shown if len(text) <= 200 else f"{shown}…"
