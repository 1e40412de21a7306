"""Native decoding and resizing have Pillow's pixels to the bit, refuse what Pillow refuses, and can be absent."""

import logging
import random

import numpy as np
import pytest
from PIL import Image, ImageFile

from data.codecs import crop_decode
from data.codecs.crop_decode import CropResizeParams, crop_resize_with_pillow, decode_crop_resize, has_jpeg_decoder
from data.codecs.pillow_decode import BadImage, decode
from data.native import library as native
from data.transforms import native_transforms
from data.transforms.native_transforms import choose, prepare_eval, prepare_train
from data.transforms.reference import eval_transform, train_transform
from tests._images import draw, encode
from utils import compile_native as building
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
    """A picture with edges everywhere, on which a missing neighbour shows."""
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.blend(draw(seed, size), Image.fromarray(values), 0.3)


def kinds(size: tuple[int, int], seed: int) -> dict[str, bytes]:
    """A picture as JPEGs of every kind that Pillow writes."""
    picture, exif = noisy(size, seed), Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0128] = 6, 72.0, 2  # rotated, with a resolution
    return {
        "4:4:4": encode(picture, subsampling=0),
        "4:2:2": encode(picture, subsampling=1, quality=95),
        "4:2:0": encode(picture, subsampling=2, quality=30),
        "progressive": encode(picture, progressive=True),
        "optimised": encode(picture, optimize=True, comment=b"words", icc_profile=bytes(300)),
        "restarts": encode(picture, restart_marker_blocks=3),
        "restarts by rows": encode(picture, restart_marker_rows=1),
        "grey": encode(picture.convert("L")),
        "not YCbCr": encode(picture, keep_rgb=True),
        "EXIF": encode(picture, exif=exif),
        "CMYK": encode(picture.convert("CMYK")),
    }


def any_job(aug_params: random.Random, width: int, height: int) -> CropResizeParams:
    """A crop, or the whole, of an image, resized to something; of that a window."""
    w, h = aug_params.choice([(width, height), (aug_params.randint(1, width), aug_params.randint(1, height))])
    out_w, out_h = aug_params.choice([(w, h), (8, 9), (30, 30), (aug_params.randint(1, 70), aug_params.randint(1, 70))])
    window_w, window_h = aug_params.choice(
        [(out_w, out_h), (aug_params.randint(1, out_w), aug_params.randint(1, out_h))]
    )
    left, top = aug_params.randint(0, width - w), aug_params.randint(0, height - h)
    window = aug_params.randint(0, out_w - window_w), aug_params.randint(0, out_h - window_h), window_w, window_h
    return CropResizeParams(left, top, w, h, out_w, out_h, *window, aug_params.randint(0, 1), aug_params.randint(0, 1))


def outcome(source: bytes, seed: int, maker) -> tuple[str, np.ndarray | None]:
    """What `maker` makes of `source` with the job of `seed`: its error and its pixels."""
    try:
        return "", maker(source, "x", lambda width, height: any_job(random.Random(seed), width, height))
    except BadImage as error:
        return str(error), None


def by_pillow(source: bytes, path: str, plan) -> np.ndarray:
    picture = decode(source, path)
    return crop_resize_with_pillow(picture, plan(*picture.size))


def assert_as_by_pillow(source: bytes, seed: int) -> None:
    (error, found), (expected_error, expected) = (
        outcome(source, seed, decode_crop_resize),
        outcome(source, seed, by_pillow),
    )
    assert error == expected_error
    assert expected is None or np.array_equal(found, expected)


@pytest.fixture
def taken(monkeypatch):
    """Counts how many images the native decoder took (True) and left to Pillow (False)."""
    counts, decoder = {True: 0, False: 0}, crop_decode._from_jpeg

    def counting(*args):
        out = decoder(*args)
        counts[out is not None] += 1
        return out

    monkeypatch.setattr(crop_decode, "_from_jpeg", counting)
    return counts


@needs_decoder
@pytest.mark.parametrize("kind", list(kinds((8, 8), 0)))
def test_every_kind_of_jpeg(kind, taken):
    for i, size in enumerate(SIZES):
        source = kinds(size, i)[kind]
        for seed in range(25):
            assert_as_by_pillow(source, 100 * i + seed)
    # What is left to Pillow: images of less than 8 columns, very tall crops.
    by_pillow_alone = kind in ("CMYK", "progressive", "not YCbCr")
    assert taken[True] == 0 if by_pillow_alone else taken[True] > 0.6 * 25 * len(SIZES)


@needs_decoder
@pytest.mark.parametrize("subsampling", ["440", "411", "422", "Gray"])
def test_subsamplings_of_another_encoder(subsampling, taken):
    simplejpeg = pytest.importorskip("simplejpeg")
    for i, size in enumerate([(100, 80), (70, 47), (129, 140)]):
        picture, colours = noisy(size, i), "RGB"
        if subsampling == "Gray":
            picture, colours = picture.convert("L"), "GRAY"
        values = np.asarray(picture).reshape(size[1], size[0], -1).copy()
        source = simplejpeg.encode_jpeg(values, colorspace=colours, colorsubsampling=subsampling)
        for seed in range(40):
            assert_as_by_pillow(source, seed)
    assert (taken[True] > 0) == (subsampling in ("422", "Gray"))


@needs_decoder
def test_every_place_of_a_crop():
    """Each left and each top edge, each right and each bottom: no row and no column beside a block's edge is off."""
    source = encode(noisy((83, 71), 0), subsampling=2, quality=90)
    whole = np.asarray(decode(source, "x"))
    for n in range(70):
        for left, top, w, h in ((n, n, 9, 1), (n, 0, 83 - n, 71), (0, n, 40, 71 - n), (0, 0, n + 1, n + 1)):
            w, h = min(w, 83 - left), min(h, 71 - top)
            found = decode_crop_resize(
                source, "x", lambda *_, box=(left, top, w, h): CropResizeParams(*box, *box[2:], 0, 0, *box[2:], 1, 0)
            )
            assert np.array_equal(found, whole[top : top + h, left : left + w]), (left, top, w, h)


@needs_library
@pytest.mark.parametrize("bicubic", [0, 1])
def test_resizing_is_pillows(bicubic):
    """By factors from 1/60 to 60, odd shapes, very flat and very tall ones."""
    shapes = [(300, 260), (31, 200), (1, 1), (3, 500), (2, 7), (700, 5), (224, 224), (61, 1)]
    for i, size in enumerate(shapes):
        picture = noisy(size, i)
        for out in ((224, 224), (96, 33), (5, 5), (1, 90), size):
            for flip in (0, 1):
                job = CropResizeParams(0, 0, *size, *out, 0, 0, *out, bicubic, flip)
                found = decode_crop_resize(np.asarray(picture), "x", lambda *_, job=job: job)
                assert np.array_equal(found, crop_resize_with_pillow(picture, job)), (size, out)
    black_and_white = Image.fromarray((np.random.RandomState(0).randint(0, 2, (64, 80, 3)) * 255).astype(np.uint8))
    job = CropResizeParams(3, 2, 50, 60, 224, 224, 0, 0, 224, 224, bicubic, 0)  # sums below 0 and above 255
    found = decode_crop_resize(np.asarray(black_and_white), "x", lambda *_: job)
    assert np.array_equal(found, crop_resize_with_pillow(black_and_white, job))


@needs_library
def test_parts_of_a_larger_array_and_other_formats():
    picture = noisy((60, 50), 1)
    part = np.asarray(picture)[5:45, 7:52]
    job = CropResizeParams(1, 2, 30, 31, 20, 20, 0, 0, 20, 20, 1, 0)
    assert np.array_equal(
        decode_crop_resize(part, "x", lambda *_: job), crop_resize_with_pillow(Image.fromarray(part), job)
    )
    for source in (picture, encode(picture, "PNG"), encode(picture.convert("RGBA"), "PNG")):
        assert np.array_equal(decode_crop_resize(source, "x", lambda *_: job), crop_resize_with_pillow(picture, job))


@needs_decoder
def test_cut_off_anywhere_is_refused_as_by_pillow(taken):
    """Also behind the last row that the crop needs, which a decoder that stops there would not notice."""
    refused = []
    for kind in ("4:2:0", "progressive", "grey", "restarts", "EXIF"):
        source = kinds((100, 80), 3)[kind]
        for end in (*range(0, len(source), 97), len(source) - 3, len(source) - 2, len(source) - 1):
            assert_as_by_pillow(source[:end], end)
            refused.append(outcome(source[:end], end, decode_crop_resize)[0] != "")
        assert_as_by_pillow(source + b"behind the end", 0)
    assert len(refused) > 100 and np.mean(refused) > 0.95


def mutated(source: bytes, aug_params: random.Random) -> bytes:
    content = bytearray(source)
    kind = aug_params.randrange(4)
    if kind < 2:  # a few bytes, anywhere or in the head
        for _ in range(aug_params.randint(1, 3)):
            content[aug_params.randrange(len(content) if kind else min(len(content), 700))] = aug_params.randrange(256)
    at = aug_params.randrange(len(content))
    if kind == 2:
        content[at : at + aug_params.randint(1, 20)] = b""
    if kind == 3:
        content[at:at] = bytes(
            aug_params.choice((0xFF, 0xD9, 0xD8, 0xD0, 0xDA, 0, 7)) for _ in range(aug_params.randint(1, 6))
        )
    return bytes(content)


def mutate_and_compare(count: int) -> None:
    sources = [source for i, size in enumerate(SIZES) for source in kinds(size, i).values()]
    for seed in range(count):
        assert_as_by_pillow(mutated(random.Random(seed).choice(sources), random.Random(seed)), seed)


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
def test_segments_that_pillow_trips_over():
    """The decoder reads past them; Pillow refuses the file, or has another opinion of what it is."""
    plain = encode(noisy((40, 36), 0))
    bodies = [b"\xe0\0\x07JFIF\0", b"\xed\0\x16Photoshop 3.0\x008BIM\x04\x04", b"\xe2\0\x0eICC_PROFILE\0"]
    bodies += [b"\xee\0\x08Adobe\0", b"\xdb\0\x07\x00abcd", b"\xe1\0\x0aExif\0\0ab", b"\xe2\0\x0cMPF\0II*\0\x08\0"]
    for body in bodies:
        assert_as_by_pillow(plain[:2] + b"\xff" + body + plain[2:], 1)


@needs_decoder
def test_decompression_bombs_are_refused_as_by_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in outcome(encode(draw(8)), 0, decode_crop_resize)[0]


@needs_library
def test_jobs_outside_the_image_are_refused():
    source, values = encode(draw(0)), np.asarray(draw(0))  # 40 × 36
    out = np.zeros((100, 100, 3), np.uint8)
    good = [1, 2, 30, 20, 10, 10, 0, 0, 10, 10, 1, 0]
    for place, value in [(0, -1), (0, 11), (1, 17), (2, 40), (3, 0), (4, 0), (5, 70_000), (6, 1), (7, -1), (9, 11)]:
        job = CropResizeParams(*[*good[:place], value, *good[place + 1 :]])
        to = out.ctypes.data
        library = native.library()
        assert (
            library.swin_resize(
                values.ctypes.data_as(crop_decode.ctypes.c_void_p),
                crop_decode.ctypes.c_long(120),
                40,
                36,
                crop_decode.ctypes.byref(job),
                crop_decode.ctypes.c_void_p(to),
            )
            == crop_decode.UNSUPPORTED
        )
        if has_jpeg_decoder():
            assert crop_decode._from_jpeg(source, (40, 36), job, out) is None
    assert not has_jpeg_decoder() or crop_decode._from_jpeg(source, (41, 36), CropResizeParams(*good), out) is None
    assert not out.any()


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """No compiler, and nothing remembered of an earlier answer."""
    found = building._load, native_transforms._missing, native_transforms._warn_once, crop_decode.has_jpeg_decoder
    for remembered in found:
        remembered.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    yield
    for remembered in found:
        remembered.cache_clear()


def test_without_a_compiler_auto_is_the_reference_and_says_so_once(without_library, caplog):
    transform = train_transform(48, 0.5, 0.4, "rand-m9-mstd0.5-inc1", 0.25, "pixel", 1, "bicubic")
    for _ in range(2):
        assert type(prepare_train("auto", transform)) is native_transforms.PillowTransform
        assert type(prepare_eval("auto", eval_transform(48, True, "bicubic"))) is native_transforms.PillowTransform
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "there is no compiler for C" in record.getMessage() and "apt-get install gcc" in record.getMessage()
    for backend in ("fast", "device"):
        with pytest.raises(UserError, match=rf"{backend}: there is no compiler for C.* To .*DATA.BACKEND ref"):
            choose(backend)
    assert choose("reference") == "reference"


@needs_library
def test_where_pillow_has_other_pixels_it_decodes_and_the_rest_is_native(monkeypatch, caplog):
    (
        crop_decode.has_jpeg_decoder.cache_clear(),
        native_transforms._missing.cache_clear(),
        native_transforms._warn_once.cache_clear(),
    )
    monkeypatch.setattr(crop_decode, "_agrees_with_pillow", lambda: False)
    try:
        assert choose("auto") == choose("fast") == "fast" and caplog.text.count("decoded by Pillow") == 1
        for seed in range(10):
            assert_as_by_pillow(encode(noisy((90, 70), 2)), seed)
    finally:
        crop_decode.has_jpeg_decoder.cache_clear(), native_transforms._missing.cache_clear()


@needs_decoder
def test_other_pixels_of_pillow_are_noticed(monkeypatch):
    crop_decode.has_jpeg_decoder.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(crop_decode, "make_with_pillow", lambda picture, job: crop_resize_with_pillow(picture, job) ^ 1)
        assert not has_jpeg_decoder()
    crop_decode.has_jpeg_decoder.cache_clear()
    assert has_jpeg_decoder()


@needs_decoder
def test_truncated_images_that_pillow_is_told_to_take(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    source = encode(noisy((90, 70), 2))
    assert_as_by_pillow(source[: len(source) // 2], 0)
