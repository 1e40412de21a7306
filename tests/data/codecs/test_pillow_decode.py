"""Every kind of image is decoded correctly or refused with its path."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from data.codecs.pillow_decode import BadImage, decode, upright
from tests._images import draw, encode

GREY_16 = np.array([[0, 255, 256, 257], [0x1234, 0x8000, 0xFF00, 0xFFFF]], np.uint16)


def pixels(source: bytes) -> np.ndarray:
    image = decode(source, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_the_format_is_found_from_the_content():
    image = draw(1)
    assert np.array_equal(pixels(encode(image, "PNG")), np.asarray(image))
    for kind in ("JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "MPO"):
        assert np.abs(pixels(encode(image, kind)).astype(int) - np.asarray(image)).mean() < 12, kind


def test_grey_and_one_bit():
    grey = draw(2, mode="L")
    assert np.array_equal(pixels(encode(grey, "PNG")), np.stack([np.asarray(grey)] * 3, -1))
    bits = draw(2, mode="1")
    assert np.array_equal(pixels(encode(bits, "PNG")), np.stack([np.asarray(bits).astype(np.uint8) * 255] * 3, -1))


def test_cmyk_jpeg_is_not_inverted():
    assert np.abs(pixels(encode(draw(3).convert("CMYK"), quality=95)).astype(int) - np.asarray(draw(3))).mean() < 6


@pytest.mark.filterwarnings("error")
def test_palette_and_transparency_keep_their_colours():
    palette = draw(4).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(pixels(encode(palette, "PNG")), expected)
    assert np.array_equal(pixels(encode(palette, "PNG", transparency=bytes([0, 128, 255]))), expected)
    rgba = draw(4).convert("RGBA")
    rgba.putalpha(draw(5, mode="L"))
    assert np.array_equal(pixels(encode(rgba, "PNG")), np.asarray(draw(4)))
    assert np.array_equal(pixels(encode(draw(4, mode="LA"), "PNG"))[..., 0], np.asarray(draw(4, mode="L")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind):
    values = pixels(encode(Image.fromarray(GREY_16), kind))
    assert np.array_equal(values, np.stack([GREY_16 >> 8] * 3, -1))


def test_8_bit_values_survive_16_bit_storage():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(pixels(encode(Image.fromarray(grey * 257), "PNG"))[..., 0], grey)


def test_exif_rotation_is_ignored_as_in_the_original():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encode(draw(6, (40, 20)), exif=exif)).shape == (20, 40, 3)


def rotated(orientation: int, kind: str, image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(image or draw(6, (41, 20)), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_upright_images_are_those_of_exif_transpose(kind, orientation):
    source = rotated(orientation, kind)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(source))).convert("RGB")
    assert expected.size == ((20, 41) if 5 <= orientation <= 8 else (41, 20))
    for given in (source, Image.open(io.BytesIO(source))):
        assert np.array_equal(np.asarray(decode(upright(given, "x"), "x")), np.asarray(expected))
    assert (upright(source, "x") is source) == (Image.open(io.BytesIO(source)).getexif().get(0x0112, 1) == 1)


def test_upright_images_keep_their_values():
    grey = rotated(6, "PNG", Image.fromarray(GREY_16))
    assert np.array_equal(np.asarray(decode(upright(grey, "x"), "x"))[..., 0], np.rot90(GREY_16 >> 8, -1))
    palette = rotated(6, "PNG", draw(4).quantize(16))
    expected = np.rot90(np.asarray(draw(4).quantize(16).convert("RGB")), -1)
    assert np.array_equal(np.asarray(decode(upright(palette, "x"), "x")), expected)
    values = np.zeros((2, 3, 3), np.uint8)
    assert upright(values, "x") is values


def test_orientation_in_xmp_data_counts_as_in_pillow():
    packet = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain = encode(draw(6, (40, 20)))
    source = plain[:2] + b"\xff\xe1" + (len(packet) + 2).to_bytes(2) + packet + plain[2:]
    assert decode(upright(source, "x"), "x").size == (20, 40)


@pytest.mark.parametrize("source", [b"", b"hello", rotated(6, "JPEG")[:300], rotated(6, "PNG")[:-60]])
def test_upright_refuses_bad_images(source):
    with pytest.raises(BadImage, match="^some/file.jpg: ."):
        upright(source, "some/file.jpg")


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"hello",
        encode(draw(7))[:400],
        encode(draw(7), "PNG")[:-60],
        encode(draw(7), "PNG").replace(b"IDAT", b"IDAX"),
        encode(draw(7), "GIF")[:60],
        encode(draw(7), "WEBP")[:100],
        encode(draw(7), "BMP")[:300],
        encode(draw(7), "EPS"),
        encode(draw(7, mode="F"), "TIFF"),
        encode(Image.fromarray(np.array([[1 << 20, -5]], np.int32)), "TIFF"),
    ],
    ids=["empty", "text", "jpeg", "png", "png chunk", "gif", "webp", "bmp", "eps", "float", "32 bit"],
)
def test_bad_images_are_refused_with_path_and_reason(source):
    with pytest.raises(BadImage, match="^some/file.jpg: .") as caught:
        decode(source, "some/file.jpg")
    assert caught.value.path == "some/file.jpg" and caught.value.reason


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(encode(draw(8), "PNG"), "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000"])
def test_mutated_files_decode_or_are_refused(kind):
    original = np.frombuffer(encode(draw(9), kind), np.uint8)
    for seed in range(60):
        noise = np.random.RandomState(seed)
        mutated = original.copy()
        mutated[noise.randint(0, len(mutated), 4)] = noise.randint(0, 256, 4)
        try:
            assert decode(mutated.tobytes(), "x").mode == "RGB"
        except BadImage as error:
            assert error.path == "x"
