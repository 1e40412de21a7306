"""Milliseconds of processor time for each stage of the data path, by each library that offers it."""

import logging
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from benchmarks.loader_pipelines import MEAN, POLICY, SIZE, STD
from data.codecs.crop_decode import CropResizeParams, OpenedImage
from data.codecs.pillow_decode import decode
from data.codecs.tiled_jpeg import TiledJpeg, encode
from data.transforms.native_transforms import NativeAugment, Normalise
from utils.seed import derive, seed_cpu
from utils.table import Column, Table

log = logging.getLogger(__name__)

BATCH = 32  # images of a batch that is collated
Work = Callable[[int], object]


def stages(images: list[bytes], rounds: int, native: bool) -> Table:
    """One turn in each round for each of `candidates`, over all `images`; medians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    works = candidates(images, native)
    costs: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for number in range(rounds):
        for key, work in list(works.items())[:: -1 if number % 2 else 1]:
            if number == 0:
                work(0)
            begun = time.thread_time()
            for i in range(len(images)):
                work(i)
            costs[key].append((time.thread_time() - begun) / len(images))
        log.info("stages: round %d/%d", number + 1, rounds)
    torch.set_num_threads(threads)
    columns = [Column("stage"), Column("by"), Column("ms an image", ".3f"), Column("images/s", ",.0f")]
    table = Table("stages", "Where the time goes: one image, one core", columns)
    for (stage, library), values in costs.items():
        cost = statistics.median(values)
        table.rows.append([stage, library, cost * 1e3, 1 / cost])
    return table


def candidates(images: list[bytes], native: bool) -> dict[tuple[str, str], Work]:
    """(stage, library) → what handles image number i. All crops are the same ones."""
    pictures = [decode(image, "") for image in images]
    crop = RandomResizedCropAndInterpolation(SIZE, interpolation="bicubic")
    random.seed(0)
    boxes = [crop.get_params(picture, crop.scale, crop.ratio) for picture in pictures]
    small = [cropped(picture, box) for picture, box in zip(pictures, boxes, strict=True)]
    works = {("decode, whole", name): work for name, work in decoders(images).items()}
    works |= resizers(pictures, boxes)
    works |= after_the_crop(small)
    if native:
        works |= native_stages(images, pictures, boxes, small)
    return works


def decoders(images: list[bytes]) -> dict[str, Work]:
    encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    works: dict[str, Work] = {
        "Pillow": lambda i: decode(images[i], ""),
        "torchvision": lambda i: decode_jpeg(encoded[i], ImageReadMode.RGB),
    }
    if find_spec("simplejpeg"):
        import simplejpeg

        works["simplejpeg"] = lambda i: simplejpeg.decode_jpeg(images[i])
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        arrays = [np.frombuffer(image, np.uint8) for image in images]
        works["OpenCV"] = lambda i: cv2.imdecode(arrays[i], cv2.IMREAD_COLOR)
    return works


Box = tuple[int, int, int, int]  # top, left, height, width


def cropped(picture: Image.Image, box: Box) -> Image.Image:
    top, left, height, width = box
    return picture.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def resizers(pictures: list[Image.Image], boxes: list[Box]) -> dict[tuple[str, str], Work]:
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    resized = partial(v2.functional.resized_crop, size=(SIZE, SIZE), interpolation=InterpolationMode.BICUBIC)
    stage = "crop and resize, bicubic"
    works: dict[tuple[str, str], Work] = {
        (stage, "Pillow"): lambda i: cropped(pictures[i], boxes[i]),
        (stage, "torchvision v2, uint8 tensors"): lambda i: resized(tensors[i], *boxes[i]),
    }
    if find_spec("cv2"):
        import cv2

        arrays = [np.array(picture) for picture in pictures]

        def by_area(i: int) -> np.ndarray:
            top, left, height, width = boxes[i]
            part = arrays[i][top : top + height, left : left + width]
            return cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

        works["crop and resize, by area", "OpenCV"] = by_area
    return works


def after_the_crop(small: list[Image.Image]) -> dict[tuple[str, str], Work]:
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() for picture in small]
    floats = [tensor.float() / 255 for tensor in tensors]
    fill = tuple(round(255 * value) for value in MEAN)
    options = {"translate_const": int(0.45 * SIZE), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    policy, other_policy = rand_augment_transform(POLICY, options), v2.RandAugment()
    erase = RandomErasing(0.25, mode="pixel", device="cpu")
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(MEAN, STD)

    def batched(samples: list, i: int) -> object:
        return default_collate([samples[(i + k) % len(samples)] for k in range(BATCH)]) if i % BATCH == 0 else None

    return {
        ("RandAugment", "timm (Pillow)"): lambda i: policy(small[i]),
        ("RandAugment", "torchvision v2, uint8 tensors (other policy)"): lambda i: other_policy(tensors[i]),
        ("to tensor", "torchvision"): lambda i: to_tensor(small[i]),
        ("normalise", "torchvision"): lambda i: normalise(floats[i]),
        ("random erasing", "timm"): lambda i: erase(floats[i]),
        ("seeding", "three generators"): lambda i: seed_cpu(derive(0, "augment", 0, i)),
        (f"collate, batches of {BATCH}", "torch, float32"): lambda i: batched(floats, i),
        (f"collate, batches of {BATCH}", "torch, uint8"): lambda i: batched(tensors, i),
    }


def native_stages(
    images: list[bytes], pictures: list[Image.Image], boxes: list[Box], small: list[Image.Image]
) -> dict[tuple[str, str], Work]:
    here = "this project"
    tiled = [TiledJpeg(encode(picture, 90)) for picture in pictures]
    arrays = [np.array(picture) for picture in small]
    whole = [np.array(picture) for picture in pictures]
    fill = tuple(round(255 * value) for value in MEAN)
    options = {"translate_const": int(0.45 * SIZE), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    policy = NativeAugment(rand_augment_transform(POLICY, options))
    normalise = Normalise(MEAN, STD)

    def params(i: int) -> CropResizeParams:
        top, left, height, width = boxes[i]
        return CropResizeParams(left, top, width, height, SIZE, SIZE, 0, 0, SIZE, SIZE, bicubic=1, flip=0)

    return {
        ("decode, crop and resize", here): lambda i: OpenedImage(images[i], "").crop_resize(params(i)),
        ("decode, crop and resize", f"{here}, tiled"): lambda i: OpenedImage(tiled[i], "").crop_resize(params(i)),
        ("crop and resize, bicubic", here): lambda i: OpenedImage(whole[i], "").crop_resize(params(i)),
        ("RandAugment", here): lambda i: policy(arrays[i].copy()),
        ("to tensor and normalise", here): lambda i: normalise(arrays[i]),
    }
