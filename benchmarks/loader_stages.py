"""Measures CPU time of each stage of the data path, for each library that offers it."""

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
from benchmarks.timing import interleave
from data.codecs.crop_decode import CropResizeParams, OpenedImage
from data.codecs.pillow_decode import decode
from data.codecs.tiled_jpeg import TiledJpeg, encode
from data.transforms.native_transforms import NativeAugment, Normalise
from utils.seed import derive, seed_cpu
from utils.table import Column, Table

BATCH = 32  # images that are collated
POLICY_OPTIONS = {
    "translate_const": int(0.45 * SIZE),
    "img_mean": tuple(round(255 * value) for value in MEAN),
    "interpolation": Image.Resampling.BICUBIC,
}
Work = Callable[[int], object]  # processes the image of the given number


def stages_table(images: list[bytes], rounds: int, native: bool) -> Table:
    """Each candidate processes all `images` in each round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    works = candidates(images, native)
    for work in works.values():
        work(0)  # warm-up
    costs = interleave({key: partial(cpu_seconds_per_image, work, len(images)) for key, work in works.items()}, rounds)
    torch.set_num_threads(threads)
    columns = [Column("stage"), Column("by"), Column("ms an image", ".3f"), Column("images/s", ",.0f")]
    table = Table("stages", "Where the time goes: one image, one core", columns)
    for (stage, library), values in costs.items():
        cost = statistics.median(values)
        table.rows.append([stage, library, cost * 1e3, 1 / cost])
    return table


def cpu_seconds_per_image(work: Work, count: int) -> float:
    start = time.thread_time()
    for i in range(count):
        work(i)
    return (time.thread_time() - start) / count


def candidates(images: list[bytes], native: bool) -> dict[tuple[str, str], Work]:
    """(stage, library) → work. All candidates use the same crops."""
    decoded = [decode(image, "") for image in images]
    crop = RandomResizedCropAndInterpolation(SIZE, interpolation="bicubic")
    random.seed(0)
    boxes = [crop.get_params(image, crop.scale, crop.ratio) for image in decoded]
    crops = [cropped(image, box) for image, box in zip(decoded, boxes, strict=True)]
    works = {("decode, whole", name): work for name, work in decoders(images).items()}
    works |= resizers(decoded, boxes)
    works |= augmentations(crops)
    if native:
        works |= native_stages(images, decoded, boxes, crops)
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


def cropped(image: Image.Image, box: Box) -> Image.Image:
    top, left, height, width = box
    return image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def resizers(decoded: list[Image.Image], boxes: list[Box]) -> dict[tuple[str, str], Work]:
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in decoded]
    resized = partial(v2.functional.resized_crop, size=(SIZE, SIZE), interpolation=InterpolationMode.BICUBIC)
    stage = "crop and resize, bicubic"
    works: dict[tuple[str, str], Work] = {
        (stage, "Pillow"): lambda i: cropped(decoded[i], boxes[i]),
        (stage, "torchvision v2, uint8 tensors"): lambda i: resized(tensors[i], *boxes[i]),
    }
    if find_spec("cv2"):
        import cv2

        arrays = [np.array(image) for image in decoded]

        def by_area(i: int) -> np.ndarray:
            top, left, height, width = boxes[i]
            part = arrays[i][top : top + height, left : left + width]
            return cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

        works["crop and resize, by area", "OpenCV"] = by_area
    return works


def augmentations(crops: list[Image.Image]) -> dict[tuple[str, str], Work]:
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in crops]
    floats = [tensor.float() / 255 for tensor in tensors]
    policy, other_policy = rand_augment_transform(POLICY, POLICY_OPTIONS), v2.RandAugment()
    erase = RandomErasing(0.25, mode="pixel", device="cpu")
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(MEAN, STD)

    def batched(samples: list, i: int) -> object:
        return default_collate([samples[(i + k) % len(samples)] for k in range(BATCH)]) if i % BATCH == 0 else None

    return {
        ("RandAugment", "timm (Pillow)"): lambda i: policy(crops[i]),
        ("RandAugment", "torchvision v2, uint8 tensors (other policy)"): lambda i: other_policy(tensors[i]),
        ("to tensor", "torchvision"): lambda i: to_tensor(crops[i]),
        ("normalise", "torchvision"): lambda i: normalise(floats[i]),
        ("random erasing", "timm"): lambda i: erase(floats[i]),
        ("seeding", "three generators"): lambda i: seed_cpu(derive(0, "augment", 0, i)),
        (f"collate, batches of {BATCH}", "torch, float32"): lambda i: batched(floats, i),
        (f"collate, batches of {BATCH}", "torch, uint8"): lambda i: batched(tensors, i),
    }


def native_stages(
    images: list[bytes], decoded: list[Image.Image], boxes: list[Box], crops: list[Image.Image]
) -> dict[tuple[str, str], Work]:
    here = "this project"
    tiled = [TiledJpeg(encode(image, 90)) for image in decoded]
    arrays = [np.array(image) for image in decoded]
    crop_arrays = [np.array(image) for image in crops]
    policy = NativeAugment(rand_augment_transform(POLICY, POLICY_OPTIONS))
    normalise = Normalise(MEAN, STD)

    def decode_crop(source: bytes | np.ndarray | TiledJpeg, i: int) -> np.ndarray:
        top, left, height, width = boxes[i]
        params = CropResizeParams(left, top, width, height, SIZE, SIZE, 0, 0, SIZE, SIZE, bicubic=1, flip=0)
        return OpenedImage(source, "").crop_resize(params)

    return {
        ("decode, crop and resize", here): lambda i: decode_crop(images[i], i),
        ("decode, crop and resize", f"{here}, tiles (packed)"): lambda i: decode_crop(tiled[i], i),
        ("crop and resize, bicubic", here): lambda i: decode_crop(arrays[i], i),
        ("RandAugment", here): lambda i: policy(crop_arrays[i].copy()),
        ("to tensor and normalise", here): lambda i: normalise(crop_arrays[i]),
    }
