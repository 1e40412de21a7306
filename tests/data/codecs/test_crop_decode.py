"""Native decoding and resizing are bit-equal to Pillow, refuse what Pillow refuses, and are optional."""

import ctypes
import logging
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFile

from data.codecs import crop_decode
from data.codecs.crop_decode import CropResizeParams, OpenedImage, Source, crop_resize_with_pillow, has_jpeg_decoder
from data.codecs.pillow_decode import BadImage, decode
from data.native import library as native
from data.transforms import native_transforms
from data.transforms.native_transforms import prepare_eval, prepare_train, resolve_backend
from data.transforms.reference import eval_transform, train_transform
from tests._images import draw, encode
from tests.data.transforms.test_reference import RECIPE
from utils import compile_native
from utils.compile_native import CannotBuild
from utils.errors import UserError

SIZES = [(100, 80), (33, 47), (64, 64), (200, 17), (5, 90), (1, 1), (2, 3), (129, 140)]


def unsupported_reason() -> str:
    try:
        native.library()
    except CannotBuild as error:
        return str(error)
    return ""


needs_library = pytest.mark.skipif(bool(unsupported_reason()), reason=f"no native library here: {unsupported_reason()}")
needs_decoder = pytest.mark.skipif(not has_jpeg_decoder(), reason="no native library, or Pillow has other pixels, here")


def noisy(size: tuple[int, int], seed: int) -> Image.Image:
    """An image with edges everywhere, so that a missing neighbour shows."""
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.blend(draw(seed, size), Image.fromarray(values), 0.3)


def kinds(size: tuple[int, int], seed: int) -> dict[str, bytes]:
    """One image as JPEGs of every kind that Pillow writes."""
    image, exif = noisy(size, seed), Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0128] = 6, 72.0, 2  # rotated, with a resolution
    return {
        "4:4:4": encode(image, subsampling=0),
        "4:2:2": encode(image, subsampling=1, quality=95),
        "4:2:0": encode(image, subsampling=2, quality=30),
        "progressive": encode(image, progressive=True),
        "optimised": encode(image, optimize=True, comment=b"words", icc_profile=bytes(300)),
        "restarts": encode(image, restart_marker_blocks=3),
        "restarts by rows": encode(image, restart_marker_rows=1),
        "grey": encode(image.convert("L")),
        "not YCbCr": encode(image, keep_rgb=True),
        "EXIF": encode(image, exif=exif),
        "CMYK": encode(image.convert("CMYK")),
    }


def random_params(rng: random.Random, width: int, height: int) -> CropResizeParams:
    """A crop, or all, of an image, an output size, and a window in the output."""
    w, h = rng.choice([(width, height), (rng.randint(1, width), rng.randint(1, height))])
    out_w, out_h = rng.choice([(w, h), (8, 9), (30, 30), (rng.randint(1, 70), rng.randint(1, 70))])
    window_w, window_h = rng.choice([(out_w, out_h), (rng.randint(1, out_w), rng.randint(1, out_h))])
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    window = rng.randint(0, out_w - window_w), rng.randint(0, out_h - window_h), window_w, window_h
    return CropResizeParams(left, top, w, h, out_w, out_h, *window, rng.randint(0, 1), rng.randint(0, 1))


Decoder = Callable[[bytes, random.Random], np.ndarray]


def outcome(source: bytes, seed: int, decoder: Decoder) -> tuple[str, np.ndarray | None]:
    """The error of `decoder`, "" for none, and its pixels; the parameters are sampled from `seed`."""
    try:
        return "", decoder(source, random.Random(seed))
    except BadImage as error:
        return str(error), None


def crop_resize(source: Source, params: CropResizeParams) -> np.ndarray:
    return OpenedImage(source, "x").crop_resize(params)


def full_image(size: tuple[int, int], out: tuple[int, int]) -> CropResizeParams:
    """All of an image of `size`, resized to `out`."""
    return CropResizeParams(0, 0, *size, *out, 0, 0, *out, bicubic=1, flip=0)


def by_library(source: bytes, rng: random.Random) -> np.ndarray:
    opened = OpenedImage(source, "x")
    return opened.crop_resize(random_params(rng, *opened.size))


def by_pillow(source: bytes, rng: random.Random) -> np.ndarray:
    image = decode(source, "x")
    return crop_resize_with_pillow(image, random_params(rng, *image.size))


def assert_equal_to_pillow(source: bytes, seed: int) -> None:
    error, found = outcome(source, seed, by_library)
    expected_error, expected = outcome(source, seed, by_pillow)
    assert error == expected_error
    assert expected is None or np.array_equal(found, expected)


@pytest.fixture
def decoded_natively(monkeypatch):
    """Counts the images that the native decoder decoded (True) and left to Pillow (False)."""
    counts, decoder = {True: 0, False: 0}, crop_decode._crop_resize_jpeg

    def counting(*args):
        out = decoder(*args)
        counts[out is not None] += 1
        return out

    monkeypatch.setattr(crop_decode, "_crop_resize_jpeg", counting)
    return counts


@needs_decoder
@pytest.mark.parametrize("kind", list(kinds((8, 8), 0)))
def test_every_kind_of_jpeg(kind, decoded_natively):
    for i, size in enumerate(SIZES):
        source = kinds(size, i)[kind]
        for seed in range(25):
            assert_equal_to_pillow(source, 100 * i + seed)
    # Pillow decodes images of less than 8 columns, and very tall crops.
    only_pillow = kind in ("CMYK", "progressive", "not YCbCr")
    assert decoded_natively[True] == 0 if only_pillow else decoded_natively[True] > 0.6 * 25 * len(SIZES)


@needs_decoder
@pytest.mark.parametrize("subsampling", ["440", "411", "422", "Gray"])
def test_subsamplings_of_another_encoder(subsampling, decoded_natively):
    simplejpeg = pytest.importorskip("simplejpeg")
    for i, size in enumerate([(100, 80), (70, 47), (129, 140)]):
        image, colours = noisy(size, i), "RGB"
        if subsampling == "Gray":
            image, colours = image.convert("L"), "GRAY"
        values = np.asarray(image).reshape(size[1], size[0], -1).copy()
        source = simplejpeg.encode_jpeg(values, colorspace=colours, colorsubsampling=subsampling)
        for seed in range(40):
            assert_equal_to_pillow(source, seed)
    assert (decoded_natively[True] > 0) == (subsampling in ("422", "Gray"))


@needs_decoder
def test_every_position_of_a_crop():
    """Each left, top, right and bottom edge: rows and columns next to a block's edge are right as well."""
    source = encode(noisy((83, 71), 0), subsampling=2, quality=90)
    expected = np.asarray(decode(source, "x"))
    for n in range(70):
        for left, top, w, h in ((n, n, 9, 1), (n, 0, 83 - n, 71), (0, n, 40, 71 - n), (0, 0, n + 1, n + 1)):
            w, h = min(w, 83 - left), min(h, 71 - top)
            params = CropResizeParams(left, top, w, h, w, h, 0, 0, w, h, bicubic=1, flip=0)
            found = crop_resize(source, params)
            assert np.array_equal(found, expected[top : top + h, left : left + w]), (left, top, w, h)


@needs_library
@pytest.mark.parametrize("bicubic", [0, 1])
def test_resizing_is_pillows(bicubic):
    """Factors from 1/60 to 60; odd, very flat and very tall shapes."""
    shapes = [(300, 260), (31, 200), (1, 1), (3, 500), (2, 7), (700, 5), (224, 224), (61, 1)]
    for i, size in enumerate(shapes):
        image = noisy(size, i)
        for out in ((224, 224), (96, 33), (5, 5), (1, 90), size):
            for flip in (0, 1):
                params = CropResizeParams(0, 0, *size, *out, 0, 0, *out, bicubic, flip)
                found = crop_resize(np.asarray(image), params)
                assert np.array_equal(found, crop_resize_with_pillow(image, params)), (size, out)
    black_and_white = Image.fromarray((np.random.RandomState(0).randint(0, 2, (64, 80, 3)) * 255).astype(np.uint8))
    params = CropResizeParams(3, 2, 50, 60, 224, 224, 0, 0, 224, 224, bicubic, 0)  # sums below 0 and above 255
    found = crop_resize(np.asarray(black_and_white), params)
    assert np.array_equal(found, crop_resize_with_pillow(black_and_white, params))


@needs_decoder
@pytest.mark.parametrize(("kind", "by_pillow"), [("4:2:0", 0), ("progressive", 1), ("CMYK", 1), ("not YCbCr", 1)])
def test_each_image_is_decoded_once(kind, by_pillow, decoded_natively, monkeypatch):
    calls = []
    monkeypatch.setattr(crop_decode, "decode", lambda *args: calls.append(args) or decode(*args))
    opened = OpenedImage(kinds((100, 80), 0)[kind], "x")
    opened.crop_resize(random_params(random.Random(0), *opened.size))
    assert len(calls) == by_pillow and decoded_natively == {True: 1 - by_pillow, False: 0}


@needs_library
def test_parts_of_a_larger_array_and_other_formats():
    image = noisy((60, 50), 1)
    part = np.asarray(image)[5:45, 7:52]
    params = CropResizeParams(1, 2, 30, 31, 20, 20, 0, 0, 20, 20, 1, 0)
    assert np.array_equal(crop_resize(part, params), crop_resize_with_pillow(Image.fromarray(part), params))
    for source in (image, encode(image, "PNG"), encode(image.convert("RGBA"), "PNG")):
        assert np.array_equal(crop_resize(source, params), crop_resize_with_pillow(image, params))


@needs_decoder
def test_cut_off_anywhere_is_refused_as_by_pillow(decoded_natively):
    """Also after the last row that the crop needs, which a decoder that stops there would not notice."""
    refused = []
    for kind in ("4:2:0", "progressive", "grey", "restarts", "EXIF"):
        source = kinds((100, 80), 3)[kind]
        for end in (*range(0, len(source), 97), len(source) - 3, len(source) - 2, len(source) - 1):
            assert_equal_to_pillow(source[:end], end)
            refused.append(outcome(source[:end], end, by_library)[0] != "")
        assert_equal_to_pillow(source + b"after the end", 0)
    assert len(refused) > 100 and np.mean(refused) > 0.95


def mutated(source: bytes, rng: random.Random) -> bytes:
    content = bytearray(source)
    kind = rng.randrange(4)
    if kind < 2:  # a few bytes, anywhere or in the header
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content) if kind else min(len(content), 700))] = rng.randrange(256)
    at = rng.randrange(len(content))
    if kind == 2:
        content[at : at + rng.randint(1, 20)] = b""
    if kind == 3:
        content[at:at] = bytes(rng.choice((0xFF, 0xD9, 0xD8, 0xD0, 0xDA, 0, 7)) for _ in range(rng.randint(1, 6)))
    return bytes(content)


def mutate_and_compare(count: int) -> None:
    sources = [source for i, size in enumerate(SIZES) for source in kinds(size, i).values()]
    for seed in range(count):
        assert_equal_to_pillow(mutated(random.Random(seed).choice(sources), random.Random(seed)), seed)


@needs_decoder
@pytest.mark.filterwarnings("ignore")
def test_corrupt_files_come_out_as_by_pillow():
    mutate_and_compare(1000)


@needs_decoder
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_corrupt_files_come_out_as_by_pillow():
    mutate_and_compare(40_000)


@needs_decoder
def test_segments_that_pillow_refuses():
    """A decoder could skip these segments; Pillow refuses the file or takes it for another format."""
    plain = encode(noisy((40, 36), 0))
    bodies = [b"\xe0\0\x07JFIF\0", b"\xed\0\x16Photoshop 3.0\x008BIM\x04\x04", b"\xe2\0\x0eICC_PROFILE\0"]
    bodies += [b"\xee\0\x08Adobe\0", b"\xdb\0\x07\x00abcd", b"\xe1\0\x0aExif\0\0ab", b"\xe2\0\x0cMPF\0II*\0\x08\0"]
    for body in bodies:
        assert_equal_to_pillow(plain[:2] + b"\xff" + body + plain[2:], 1)


@needs_decoder
def test_decompression_bombs_are_refused_as_by_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in outcome(encode(draw(8)), 0, by_library)[0]


@needs_decoder
@pytest.mark.parametrize("size", [(8, 65500), (65500, 8)])
def test_jpegs_with_longer_sides_than_libjpeg_takes_are_refused_as_by_pillow(size):
    """65,500 is the limit; 65,504 has the same number of blocks, so that the rest of the file stays right."""
    source = encode(Image.new("L", size, 90))
    error, pixels = outcome(source, 0, lambda source, _: crop_resize(source, full_image(size, (20, 30))))
    assert not error and pixels.shape == (30, 20, 3)
    frame = source.index(b"\xff\xc0") + (5 if size[0] == 8 else 7)
    assert source[frame : frame + 2] == (65500).to_bytes(2)
    longer = source[:frame] + (65504).to_bytes(2) + source[frame + 2 :]
    part = CropResizeParams(0, 0, 8, 8, 8, 8, 0, 0, 8, 8, bicubic=1, flip=0)
    for decoder in (lambda source, _: crop_resize(source, part), by_pillow):
        assert outcome(longer, 0, decoder)[0] == "x: broken data stream when reading image file"


@needs_library
def test_params_outside_the_image_are_refused():
    source, values = encode(draw(0)), np.asarray(draw(0))  # 40 × 36
    out = np.zeros((100, 100, 3), np.uint8)
    good = [1, 2, 30, 20, 10, 10, 0, 0, 10, 10, 1, 0]
    for field, value in [(0, -1), (0, 11), (1, 17), (2, 40), (3, 0), (4, 0), (5, 70_000), (6, 1), (7, -1), (9, 11)]:
        params = CropResizeParams(*[*good[:field], value, *good[field + 1 :]])
        status = native.library().swin_resize(
            ctypes.c_void_p(values.ctypes.data), ctypes.c_long(120), 40, 36, ctypes.byref(params),
            ctypes.c_void_p(out.ctypes.data),
        )  # fmt: skip
        assert status == crop_decode.UNSUPPORTED
        if has_jpeg_decoder():
            assert crop_decode._crop_resize_jpeg(source, (40, 36), params, None) is None
    assert (
        not has_jpeg_decoder() or crop_decode._crop_resize_jpeg(source, (41, 36), CropResizeParams(*good), None) is None
    )
    assert not out.any()


@needs_library
def test_results_that_do_not_fit_are_refused():
    """The C code trusts shapes: a smaller buffer would be written past its end."""
    params = CropResizeParams(1, 2, 30, 20, 10, 9, 0, 0, 10, 9, 1, 0)
    wrong = [np.empty((10, 9, 3), np.uint8), np.empty((9, 10, 3), np.int16), np.empty((9, 20, 3), np.uint8)[:, ::2]]
    for source in (encode(draw(0)), encode(draw(0), "PNG"), np.asarray(draw(0))):
        for out in wrong:
            with pytest.raises(ValueError, match="the native library needs a contiguous array of uint8"):
                OpenedImage(source, "x").crop_resize(params, out)
        OpenedImage(source, "x").crop_resize(params, np.empty((9, 10, 3), np.uint8))


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """No compiler, and empty caches."""
    caches = (
        compile_native._load,
        native_transforms._library_error,
        native_transforms._warn_once,
        crop_decode.has_jpeg_decoder,
    )
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_auto_is_the_reference_and_warns_once(without_library, caplog):
    transform = train_transform(48, **RECIPE)
    for _ in range(2):
        assert type(prepare_train("auto", transform)) is native_transforms.PillowTransform
        assert type(prepare_eval("auto", eval_transform(48, True, "bicubic"))) is native_transforms.PillowTransform
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "there is no compiler for C" in record.getMessage() and "apt-get install gcc" in record.getMessage()
    for backend in ("native", "gpu"):
        with pytest.raises(UserError, match=rf"{backend}: there is no compiler for C.* To .*DATA.BACKEND ref"):
            resolve_backend(backend)
    assert resolve_backend("reference") == "reference"


@needs_library
def test_if_pillow_has_other_pixels_it_decodes_and_the_rest_is_native(monkeypatch, caplog):
    caches = crop_decode.has_jpeg_decoder, native_transforms._library_error, native_transforms._warn_once
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(crop_decode, "_agrees_with_pillow", lambda: False)
    try:
        assert resolve_backend("auto") == resolve_backend("native") == "native"
        assert caplog.text.count("Pillow decodes all JPEGs") == 1
        for seed in range(10):
            assert_equal_to_pillow(encode(noisy((90, 70), 2)), seed)
    finally:
        for cached in caches:
            cached.cache_clear()


@needs_decoder
def test_other_pixels_of_pillow_are_noticed(monkeypatch):
    crop_decode.has_jpeg_decoder.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(crop_decode, "crop_resize_with_pillow", lambda *args: crop_resize_with_pillow(*args) ^ 1)
        assert not has_jpeg_decoder()
    crop_decode.has_jpeg_decoder.cache_clear()
    assert has_jpeg_decoder()


@needs_decoder
def test_truncated_images_that_pillow_is_told_to_take(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    source = encode(noisy((90, 70), 2))
    assert_equal_to_pillow(source[: len(source) // 2], 0)
