"""Input images: which bytes and paths are decoded, how they are fitted, which are refused; and encoding."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stylemill.config.inputs import InputSettings
from stylemill.errors import ImageError, StorageError
from stylemill.images import decode
from stylemill.images.encode import encode_image
from stylemill.images.read import load_image

SIZE = (32, 24)


def as_bytes(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def load(data: bytes | None, path: str | None = None, size=SIZE, fit="stretch", base: str | Path = ".") -> np.ndarray:
    return load_image(path, data, base, size, fit).pixels


def photo(width: int = 200, height: int = 150) -> Image.Image:
    """Smooth colours and one hard edge, as in a photo; each corner has another colour."""
    y, x = np.mgrid[0:height, 0:width]
    bands = [255 * x / width, 255 * y / height, np.where(x > width / 2, 200.0, 40.0)]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ── decoding to RGB ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM"])
def test_every_format_is_read(image_format):
    if image_format not in decode._AVAILABLE:
        pytest.skip(f"this Pillow has no {image_format}")
    pixels = load(as_bytes(photo(), image_format))
    assert pixels.shape == (24, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - load(as_bytes(photo()))).mean() < 8


def test_the_digest_is_of_the_file_and_bytes_take_precedence_over_the_path(tmp_path):
    data = as_bytes(photo())
    (tmp_path / "in").mkdir()
    (tmp_path / "in/photo.jpg").write_bytes(data)  # the suffix does not matter
    from_path = load_image("in/photo.jpg", None, tmp_path, SIZE, "crop")
    from_bytes = load_image("never/opened.png", data, tmp_path, SIZE, "crop")
    assert from_path.file_sha256 == from_bytes.file_sha256 == hashlib.sha256(data).hexdigest()
    assert np.array_equal(from_path.pixels, from_bytes.pixels)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 255), (90, 90, 90)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 102), (255, 153, 153)),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16", 255, (1, 1, 1)),
    ],
)
def test_every_mode_of_png_becomes_rgb(mode, value, expected):
    pixels = load(as_bytes(Image.new(mode, (16, 16), value)))
    assert (pixels == expected).all()


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("I;16B", 65535, 255),
        ("I", 32896, 128),
        ("F", 0.5, 128),
        ("F", 200.0, 200),
        ("CMYK", (0, 0, 0, 255), 0),
        ("YCbCr", (128, 128, 128), 128),
    ],
)
def test_every_mode_of_tiff_becomes_rgb(mode, value, expected):
    assert (load(as_bytes(Image.new(mode, (16, 16), value), "TIFF")) == expected).all()


@pytest.mark.parametrize(("mode", "value"), [("F", float("nan")), ("F", 1e6), ("F", -1.0), ("I", -5), ("I", 10**6)])
def test_values_of_unknown_range_are_refused(mode, value):
    with pytest.raises(ImageError, match="8-bit"):
        load(as_bytes(Image.new(mode, (16, 16), value), "TIFF"), "depth.tif")


def test_a_cmyk_jpeg_becomes_rgb():
    pixels = load(as_bytes(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 6


def test_transparency_of_palettes_and_colour_keys_becomes_white():
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    assert (load(as_bytes(palette)) == (200, 0, 0)).all()
    assert (load(as_bytes(palette, transparency=1)) == 255).all()
    assert (load(as_bytes(palette, transparency=bytes([255, 102]))) == (233, 153, 153)).all()
    assert (load(as_bytes(palette, "GIF", transparency=1)) == 255).all()
    assert (load(as_bytes(Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3))) == 255).all()


def test_the_colour_of_transparent_pixels_does_not_bleed_into_others():
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    assert (load(as_bytes(image)) == 255).all()


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(image_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = as_bytes(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert np.abs(load(data).astype(int) - (250, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(orientation, image_format):
    upright = photo(96, 64)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera stored it: Image.Transpose members
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = load(as_bytes(stored, image_format, exif=exif), size=(96, 64))
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_photo_with_broken_exif_is_read():
    assert load(as_bytes(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape == (24, 32, 3)


# ── fitting ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("shape", [(8, 8), (9, 2000), (2000, 9), (500, 300), (32, 24), (33, 24)])
def test_every_shape_fits(fit, shape):
    assert load(as_bytes(photo(*shape)), fit=fit).shape == (24, 32, 3)


def test_crop_keeps_the_centre_and_pad_adds_white():
    image = Image.new("RGB", (300, 100), "red")
    ImageDraw.Draw(image).rectangle((100, 0, 199, 99), fill="blue")
    data = as_bytes(image)
    crop, pad, stretch = (load(data, size=(90, 90), fit=fit) for fit in ("crop", "pad", "stretch"))
    assert (crop[:, 3:-3] == (0, 0, 255)).all()
    assert (pad[:30] == 255).all()
    assert (pad[60:] == 255).all()
    assert (pad[31:59, 1:27] == (255, 0, 0)).all()
    assert (stretch[:, 1:27] == (255, 0, 0)).all()
    assert (stretch[:, 33:57] == (0, 0, 255)).all()


def test_an_image_of_the_right_size_is_not_changed():
    image = photo(*SIZE)
    for fit in ("crop", "pad", "stretch"):
        assert np.array_equal(load(as_bytes(image), fit=fit), np.asarray(image))


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same():
    image = photo(1600, 1200)
    data = as_bytes(image, "JPEG", quality=95, subsampling=0)
    full = Image.open(io.BytesIO(data)).resize((64, 48), Image.Resampling.LANCZOS)
    assert np.abs(load(data, size=(64, 48)).astype(int) - np.asarray(full)).max() <= 4


def test_several_threads_decode_to_the_same_bytes():
    data = as_bytes(photo(), "JPEG")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: load(data).tobytes(), range(64)))
    assert len(set(results)) == 1


# ── refused images ────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "zero bytes": (b"", "0 bytes"),
    "text": (b"this is not an image at all\n" * 9, "not an image"),
    "SVG": (b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
    "PDF": (b"%PDF-1.7\n", "PDF"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "download failed"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
    "ICO": (as_bytes(photo(32, 32), "ICO"), "not an image, or in a format"),
    "1x1": (as_bytes(photo(1, 1)), "1 × 1 pixels"),
    "7 high": (as_bytes(photo(700, 7)), "700 × 7 pixels"),
    "bomb": (png_header(50_000, 50_000), "178,956,970"),
    "bomb beyond 32 bits": (png_header(2**31 - 1, 2**31 - 1), "178,956,970"),
    "no pixels": (png_header(100, 100), "truncated or damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_usable_image_are_refused(case, tmp_path):
    data, message = REFUSED[case]
    (tmp_path / "named.jpg").write_bytes(data)
    for kind in ({"data": data, "path": "named.jpg"}, {"data": None, "path": "named.jpg", "base": tmp_path}):
        with pytest.raises(ImageError, match=f"^named.jpg: .*{message}") as caught:
            load(**kind)
        assert "0x" not in str(caught.value)  # messages are stored with the run, and must be equal in every attempt


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF"])
def test_a_truncated_file_is_an_image_error(image_format):
    if image_format not in decode._AVAILABLE:
        pytest.skip(f"this Pillow has no {image_format}")
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    data = as_bytes(Image.fromarray(noise), image_format)
    for keep in {1, 2, 10, 30, 60, len(data) // 3, len(data) // 2, len(data) * 9 // 10}:
        with pytest.raises(ImageError, match=r"^a\.img: "):
            load(data[:keep], "a.img")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_changed_bytes_raise_no_other_error(image_format):
    if image_format not in decode._AVAILABLE:
        pytest.skip(f"this Pillow has no {image_format}")
    data, random = as_bytes(photo(40, 30), image_format), np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for position in random.integers(0, len(data), 3):
            damaged[position] = random.integers(256)
        with contextlib.suppress(ImageError):
            load(bytes(damaged), "a.img")


def test_paths_that_cannot_be_images_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        "absent.png": "No such file",
        "absent/absent.png": "No such file",
        ".": "is a folder",
        "pipe": "not a regular file",
        "a\0b": "null",
        "x" * 5000: "too long",
        "socket": "No such device",
        "loop": "Too many levels of symbolic links",
        "file:///etc/passwd": "file:// is not read",
        "ftp://example.org/a.png": "ftp:// is not read",
        "": "neither a path nor bytes",
        None: "neither a path nor bytes",
    }
    for path, message in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            load(None, path, base=tmp_path)
        assert len(str(caught.value)) < 700


def test_bytes_without_a_path_are_named_by_their_digest():
    with pytest.raises(ImageError, match="sha256:" + hashlib.sha256(b"junk").hexdigest()[:16]):
        load(b"junk")


def test_the_limits_of_bytes_and_pixels_are_those_of_the_job(tmp_path):
    data = as_bytes(photo())
    (tmp_path / "a.png").write_bytes(data)
    for inputs, message in (
        (InputSettings(max_bytes=len(data) - 1), r"has [\d,]+ bytes, over the limit of [\d,]+ \(inputs.max_bytes\)"),
        (
            InputSettings(max_pixels=200 * 150 - 1),
            r"200 × 150 pixels, over the limit of 29,999 pixels \(inputs.max_pixels\)",
        ),
    ):
        for given in (data, None):
            with pytest.raises(ImageError, match=rf"^a\.png: {message}"):
                load_image("a.png", given, tmp_path, SIZE, "crop", inputs=inputs)
    exact = InputSettings(max_bytes=len(data), max_pixels=200 * 150)
    assert load_image("a.png", None, tmp_path, SIZE, "crop", inputs=exact).source_size == (200, 150)


def test_files_of_unknown_size_are_not_read_beyond_the_limit():
    """Files in /proc have size 0 and may have no end."""
    with pytest.raises(ImageError, match=r"cmdline: has 11 bytes, over the limit of 10 "):
        load_image("/proc/self/cmdline", None, "/", SIZE, "crop", inputs=InputSettings(max_bytes=10))


def test_the_pixel_limit_holds_where_that_of_pillow_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="50000 × 50000 pixels"):
        load(png_header(50_000, 50_000), "a.png")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE])
def test_errors_of_the_disk_are_transient(number, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(as_bytes(photo()))

    def fails(path, flags):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(StorageError, match=f"a.png: .*{os.strerror(number)}"):
        load(None, "a.png", base=tmp_path)


def test_too_little_memory_is_transient(monkeypatch):
    def fails(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(decode, "_convert_to_rgb", fails)
    with pytest.raises(StorageError, match="memory"):
        load(as_bytes(photo()), "a.png")


# ── encoding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_encoding_gives_the_same_bytes_and_close_pixels(image_format):
    pixels = np.asarray(photo())
    data = encode_image(pixels, image_format, 95)
    assert data == encode_image(pixels[:, ::-1][:, ::-1], image_format, 95)  # the array need not be contiguous
    again = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(again.astype(int) - pixels).mean() < (0.001 if image_format == "png" else 3)


def test_jpeg_keeps_the_colour_resolution_and_quality_sets_its_size():
    red_lines = np.zeros((64, 64, 3), np.uint8)
    red_lines[::2, :, 0] = 255
    again = np.asarray(Image.open(io.BytesIO(encode_image(red_lines, "jpeg", 100))))
    assert np.abs(again.astype(int) - red_lines).max() < 12
    assert len(encode_image(np.asarray(photo()), "jpeg", 30)) < len(encode_image(np.asarray(photo()), "jpeg", 95))


def test_noise_can_be_encoded_with_quality_100():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    for image_format in ("png", "jpeg", "webp"):
        assert encode_image(noise, image_format, 100)
