import base64
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visualglm.errors import ImageError
from visualglm.processing.image import ImageLimits, check_image, load_image, preprocess

GOLDENS = Path(__file__).parents[1] / "goldens" / "preprocess"
META = json.loads((GOLDENS / "meta.json").read_text("utf-8"))
GOLDEN_FILES = sorted(path.name for path in GOLDENS.glob("*.png"))
RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def colours(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(source, *args, **kwargs) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, *args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, with only the beginning of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_pixels_are_those_of_the_original_bit_for_bit(name):
    assert len(GOLDEN_FILES) == 5
    golden, facts = np.load(GOLDENS / "golden.npz"), META["files"][name]
    image = load_image(GOLDENS / name)
    assert hashlib.sha256(image.tobytes()).hexdigest() == facts["rgb_sha256"]
    pixels = preprocess(image, META["size"])
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), np.float32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == facts["f32_sha256"]
    resized = image.resize((224, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resized), golden[f"{name}/resized_u8"])
    if f"{name}/pixel_f16" in golden:
        assert np.array_equal(pixels.astype(np.float16), golden[f"{name}/pixel_f16"])


def test_every_kind_of_source_gives_the_same_image(tmp_path):
    path = GOLDENS / "gradient_320x200.png"
    data, expected = path.read_bytes(), colours(load_image(path))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for source in (
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        Image.open(path),
        expected,
        url,
        expected[:, ::-1][:, ::-1],
    ):
        assert np.array_equal(colours(load_image(source)), expected)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG", "MPO"])
def test_every_format_is_read(format):
    data = encoded(Image.new("RGB", (20, 10), RED), format)
    image = load_image(data)
    assert image.size == (20, 10)
    assert np.abs(colours(image).astype(int) - RED).max() <= 2


def test_other_formats_are_refused():
    for format in ("TIFF", "ICO", "PPM"):
        assert "JPEG, PNG, WebP, BMP or GIF" in refusal(encoded(Image.new("RGB", (20, 10)), format))
    assert "HEIC or AVIF" in refusal(b"\0\0\0\x18ftypheic" + bytes(50))


# Where EXIF says the first row and the first column of the stored image belong: 6 is (right side, top), and so on.
STORED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    turned = load_image(encoded(Image.fromarray(STORED[orientation](upright)), format, exif=exif, **options))
    assert np.abs(colours(turned).astype(int) - upright).max() <= 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_matter():
    data = encoded(Image.new("RGB", (8, 8), RED), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert colours(load_image(data))[0, 0].tolist() == list(RED)


def test_transparency_is_dropped_not_composited():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 255
    for source in (
        encoded(Image.fromarray(rgba)),
        rgba,
        encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
    ):
        assert (colours(load_image(source)) == RED).all()
    grey = Image.new("LA", (2, 2), (77, 0))
    assert (colours(load_image(encoded(grey))) == 77).all()
    assert (colours(load_image(encoded(Image.new("RGB", (2, 2), RED), transparency=RED))) == RED).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80"])
def test_palettes(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    assert colours(load_image(encoded(image, **options)))[0].tolist() == [list(RED), list(GREEN)]


def test_deep_grey_keeps_its_range():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert colours(load_image(encoded(Image.fromarray(values))))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_cmyk_and_bilevel():
    cmyk = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(colours(cmyk).astype(int) - RED).max() <= 3
    assert (colours(load_image(encoded(Image.new("1", (2, 2), 1)))) == 255).all()


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), GREEN)]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(colours(load_image(data)).astype(int) - RED).max() <= 2


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50000, 50000))
    program = (
        "import resource, sys; from visualglm.processing.image import load_image, ImageError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_image(sys.argv[1])\n"
        "except ImageError as error: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    kibibytes, message = result.stdout.split(" ", 1)
    assert int(kibibytes) < 50 * 1024
    assert "2500000000 pixels, over the limit of 67108864 pixels" in message


def test_a_limit_above_that_of_pillow_does_not_hold():
    message = refusal(png_header(50000, 50000), ImageLimits(max_pixels=10**10))
    assert f"over the limit of {2 * Image.MAX_IMAGE_PIXELS} pixels" in message


def test_the_limits_are_configurable_and_named():
    data = encoded(Image.new("RGB", (20, 10)))
    few_pixels, few_bytes = ImageLimits(max_pixels=199), ImageLimits(max_bytes=len(data) - 1)
    for source in (data, np.zeros((10, 20), np.uint8), Image.new("L", (20, 10))):
        assert "20×10 pixels, over the limit of 199 pixels" in refusal(source, few_pixels)
        load_image(source, ImageLimits(max_pixels=200))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, url):
        load_image(source, ImageLimits(max_bytes=len(data)))
        assert f"{len(data) - 1} bytes allowed" in refusal(source, few_bytes)


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "67108864 bytes allowed" in refusal(path)


def test_what_is_no_image_file_is_named(tmp_path):
    pointer, text, empty, cut, pipe = (
        tmp_path / name for name in ("lfs.png", "text.jpg", "empty.png", "cut.png", "pipe.png")
    )
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    text.write_text("hello")
    empty.touch()
    cut.write_bytes((GOLDENS / "noise_224x224.png").read_bytes()[:3000])
    os.mkfifo(pipe)
    for path, words in {
        tmp_path / "missing.png": "does not exist",
        tmp_path: "a folder",
        pointer: "a git-lfs pointer",
        text: "not an image",
        empty: "empty (0 bytes)",
        cut: "damaged or cut short",
        pipe: "a pipe or a device",
        Path("/dev/zero"): "a pipe or a device",
        Path("a\0b"): "cannot be read",
        Path("a" * 300): "cannot be read",
    }.items():
        message = refusal(path)
        assert words in message, message
        assert refusal(str(path)) == message
        with pytest.raises(ImageError) as caught:
            check_image(path)
        assert str(caught.value) == message


def test_images_cut_or_damaged_anywhere_are_read_or_refused():
    rng = np.random.default_rng(7)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    for format in ("PNG", "BMP", "GIF", "WEBP", "JPEG"):
        data = encoded(noise, format)
        variants = [data[:length] for length in range(1, len(data), 41)]
        for position in rng.integers(0, len(data), 60):
            variants.append(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        for variant in variants:
            try:
                assert load_image(variant).mode == "RGB"
            except ImageError as error:
                assert str(error).endswith(".")


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_checking_finds_what_loading_would(tmp_path, format):
    noise = np.kron(np.random.default_rng(7).integers(0, 256, (30, 40, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    data = encoded(Image.fromarray(noise), format)
    path = tmp_path / "image"
    path.write_bytes(data)
    check_image(path)
    for share in (0.2, 0.6, 0.99):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ImageError, match="damaged or cut short"):
            check_image(path)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="320×240 pixels, over the limit of 999 pixels"):
        check_image(path, ImageLimits(max_pixels=999))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    assert "array" in refusal(array)


def test_other_sources_are_refused():
    assert "NoneType" in refusal(None)
    assert "floating-point" in refusal(Image.new("F", (2, 2)))
    assert "no pixels" in refusal(Image.new("RGB", (0, 2)))
    assert "base64" in refusal("data:image/png,abc")
    assert "not valid base64" in refusal("data:image/png;base64,@@@@")
    assert "empty" in refusal("data:image/png;base64,")


def test_an_empty_path_is_called_so():
    assert refusal("") == "The path of the image is empty; give the path of one image."


def test_addresses_are_not_opened():
    for url in ("http://127.0.0.1/a.png", "HTTPS://example.com/a.png"):
        assert "URLs are not allowed" in refusal(url)
    for url in (f"file://{GOLDENS}/noise_224x224.png", "ftp://example.com/a.png", "gopher://a", "http://a\nb"):
        assert "no http(s) address" in refusal(url, allow_urls=True)


def test_the_callers_image_is_left_as_it_was():
    image = Image.new("P", (4, 4))
    image.info["transparency"] = b"\0"
    loaded = load_image(image)
    assert (image.mode, image.info) == ("P", {"transparency": b"\0"})
    rgb = Image.new("RGB", (4, 4))
    assert load_image(rgb) is not rgb
    assert loaded.mode == "RGB"
