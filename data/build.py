"""Builds data sets and batches from the configuration; the only file in `data/` that reads it.

B images of a micro-batch, K classes, S image size.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from data.datasets import base as datasets
from data.datasets.base import Images
from data.datasets.classes import (
    WeightClasses,
    match_val_to_train,
    match_val_to_weights,
    names_of,
    relabel_by_number,
    warn_about_names,
)
from data.datasets.digits import write_demo
from data.datasets.packed import LAYOUT as LAYOUT_PACKED
from data.datasets.packed import open_packed
from data.datasets.timm_datasets import TORCH_FOLDERS, open_timm
from data.datasets.validate import check_classes, check_num_classes, check_num_workers, check_packed_orientation
from data.loader.loader import (
    BadImageCount,
    BatchLoader,
    EvalSamples,
    LabelledImage,
    TrainSamples,
    explain_worker_crash,
)
from data.loader.sampler import StreamSampler, eval_indices
from data.loader.shared_memory import BatchKeys, SampleFn
from data.transforms.eval_presets import EvalPreset, InputConfig, eval_preset, timm_inputs
from data.transforms.mixup import Mixer
from data.transforms.native_transforms import GpuTrainTransform, prepare_eval, prepare_train
from data.transforms.reference import Transform, train_transform
from utils.distributed.process_group import DistInfo, local_rank_zero_first
from utils.errors import UserError
from utils.malloc import available_memory
from utils.origins import ORIGINS, TORCHVISION_NAMES

log = logging.getLogger(__name__)

# Validation workers stay between passes if their buffers take less than this share of the available memory.
KEPT_BUFFERS_SHARE = 0.1


@dataclass(frozen=True)
class Data:
    """The data of a run. `train` is None for evaluation only; `class_names` is by label, None when unknown."""

    train: Images | None
    val: Images
    num_classes: int
    class_names: list[str] | None

    @property
    def train_images(self) -> Images:
        """The training images. Raises ValueError where there are none."""
        if self.train is None:
            raise ValueError("the data were opened for evaluation only")
        return self.train


def build_datasets(
    config: CfgNode, dist_info: DistInfo, read_weights: Callable[[], WeightClasses] | None = None
) -> Data:
    """Opens and checks the data that the configuration names.

    One process of each machine goes first, so that the others find what is written once (index, demo, download).

    Args:
        read_weights: gives the classes of the weights to evaluate; called once the data are found.

    Raises:
        UserError: the data are missing, have another layout, another number of classes than MODEL.NUM_CLASSES,
            classes in val that train (or the weights) do not have, or ImageNet-1K's classes in another order.
    """
    root = _data_path(config)
    check_num_workers(config.DATA.NUM_WORKERS, dist_info.local_world_size)
    with local_rank_zero_first(dist_info):
        train = None if config.EVAL_MODE else _open(config, root, "train", dist_info)
        val = _open(config, root, "val", dist_info)
    weights = read_weights() if read_weights is not None and train is None else None
    name, of_imagenet = f"DATA.DATA_PATH {root}", config.DATA.DATASET in ("imagenet", "packed")
    if train is None:
        check_classes(val, f"{name}, val", of_imagenet, known=(weights and weights.names) or ())
        numbering = val = match_val_to_weights(val, weights, config.MODEL.NUM_CLASSES, name)
    else:
        check_classes(train, f"{name}, train", of_imagenet)
        check_classes(val, f"{name}, val", of_imagenet, known=train.class_names or ())
        numbering, val = train, match_val_to_train(train, val, name)
    class_names = names_of(numbering) or names_of(val)
    if class_names is not None and not (weights and weights.names):
        warn_about_names(class_names, name)
    num_classes = check_num_classes(numbering.num_classes, config.MODEL.NUM_CLASSES, name)
    return Data(train, val, num_classes, class_names)


def _data_path(config: CfgNode) -> Path:
    name, path = config.DATA.DATASET, config.DATA.DATA_PATH
    layouts = {"imagenet": datasets.LAYOUT_FOLDER, "imagenet22K": datasets.LAYOUT_22K, "packed": LAYOUT_PACKED}
    layout = datasets.LAYOUT_ZIP if config.DATA.ZIP_MODE else layouts.get(name, "{root}, a folder to download to")
    if not path:
        raise UserError(f"DATA.DATA_PATH is empty: give --data-path DIR. Expected {layout.format(root='DIR')}.")
    root = Path(path)
    if not root.is_dir() and name in layouts:
        raise UserError(f"DATA.DATA_PATH (--data-path): no folder {root}. Expected {layout.format(root=root)}.")
    return root


def _open(config: CfgNode, root: Path, split: str, dist_info: DistInfo) -> Images:
    name = config.DATA.DATASET
    if config.DATA.ZIP_MODE:
        # As in the original code, validation images are never copied into memory: they are read once an epoch.
        mode = "part" if split == "val" and config.DATA.CACHE_MODE == "full" else config.DATA.CACHE_MODE
        return datasets.open_zip(root, split, mode, dist_info.local_rank, dist_info.local_world_size)
    if name == "demo":
        write_demo(root)
    if name == "packed":
        packed = open_packed(root, split)
        check_packed_orientation(packed.settings, config.DATA.EXIF_ORIENTATION, f"{root / split}")
        return packed
    if name in ("imagenet", "demo"):
        return datasets.open_folder(root, split)
    if name == "imagenet22K":
        return datasets.open_imagenet_22k(root, split)
    images = open_timm(name, root, is_training=split == "train")
    return relabel_by_number(images) if name.lower() in TORCH_FOLDERS else images


class TrainBatches:
    """This process's micro-batches of the training stream from `start_samples` to `stop_samples`, on its device.

    Yields {'image': (B, 3, S, S) float32, 'target': (B,) int64, or (B, K) float32 when mixing, 'position': stream
    position of the first sample}. The workers live as long as the iteration and prefetch across epochs.

    Attributes:
        wait_seconds: time spent waiting for batches so far.
        bad_images: number of different images of this process that could not be used so far.
        loader: gives the same batches in host memory, before augmentation on the device and mixing.
    """

    def __init__(
        self,
        config: CfgNode,
        data: Data,
        dist_info: DistInfo,
        start_samples: int,
        stop_samples: int,
        *,
        transform: Transform,
        mixer: Mixer | None,
    ):
        """`transform` and `mixer` are the task's.

        Raises:
            ValueError: start to stop is not a whole number of micro-batches of all processes.
        """
        images = data.train_images
        prepare = prepare_train(config.DATA.BACKEND, transform)
        labelled = LabelledImage(prepare, config.DATA.EXIF_ORIENTATION)
        samples = TrainSamples(images, labelled, config.SEED, config.DATA.MAX_BAD_IMAGES)
        self.wait_seconds = 0.0
        self._augment = prepare.augment if isinstance(prepare, GpuTrainTransform) else None
        self._mixer = mixer
        self._example = images.path(0)
        self._batch_size = config.DATA.BATCH_SIZE
        self._num_workers = config.DATA.NUM_WORKERS
        self._bad = BadImageCount(config.DATA.MAX_BAD_IMAGES, "replaced by the next good one")
        self._sampler = StreamSampler(
            n=len(images),
            seed=config.SEED,
            batch_size=self._batch_size,
            rank=dist_info.rank,
            world_size=dist_info.world_size,
            start=start_samples,
            stop=stop_samples,
        )
        self.loader = _batch_loader(
            config,
            dist_info,
            samples=samples,
            keys=self._sampler,
            num_workers=self._num_workers,
            as_bytes=self._augment is not None,
        )

    @property
    def bad_images(self) -> int:
        return len(self._bad.seen)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Generator[dict[str, Tensor | int], None, None]:
        """Raises UserError when a worker dies or there are more bad images than DATA.MAX_BAD_IMAGES."""
        with self.loader.started() as batches:
            for position in self._sampler.positions:
                start = time.perf_counter()
                with explain_worker_crash(self._num_workers):
                    batch = next(batches)
                self.wait_seconds += time.perf_counter() - start
                self._bad.add(batch["bad"])
                if len(batch["image"]) < self._batch_size:
                    raise UserError(
                        f"DATA.DATA_PATH: none of the training images can be read, such as {self._example}. Check them."
                    )
                batch = self.loader.to_device(batch)
                image, target = batch["image"], batch["target"]
                if self._augment is not None:
                    image = self._augment(image, batch["aug_params"])
                if self._mixer is not None:
                    image, target = self._mixer(image, target, position)
                yield {"image": image, "target": target, "position": position}


class ValBatches:
    """This process's share of the validation images, each once, on its device; can be iterated any number of times.

    Yields {'image': (B, 3, S, S) float32, 'target': (B,) int64}; B varies (the last batch, and bad images left out).
    Workers are started for each pass and end with it, except inside of `keep_workers`.

    Attributes:
        bad_images: number of different images of this process that could not be used so far.
        loader: gives the same batches in host memory.
    """

    def __init__(self, config: CfgNode, data: Data, dist_info: DistInfo, preset: EvalPreset):
        batch_size = config.DATA.BATCH_SIZE
        indices = eval_indices(len(data.val), dist_info.rank, dist_info.world_size)
        batches = [indices[i : i + batch_size].tolist() for i in range(0, len(indices), batch_size)]
        log.info("evaluation preset: %s (%s)", preset.origin, preset.description)
        self._num_workers = min(config.DATA.NUM_WORKERS, len(batches))
        self._bad = BadImageCount(config.DATA.MAX_BAD_IMAGES, "left out")
        prepare = prepare_eval(config.DATA.BACKEND, preset.transform)
        samples = EvalSamples(data.val, LabelledImage(prepare, config.DATA.EXIF_ORIENTATION))
        self.loader = _batch_loader(config, dist_info, samples, batches, self._num_workers)
        self._processes_per_host = dist_info.local_world_size
        self._passes: Iterator[Iterator[dict]] | None = None  # inside of `keep_workers`

    @property
    def bad_images(self) -> int:
        return len(self._bad.seen)

    def __len__(self) -> int:
        return len(self.loader)

    @contextmanager
    def keep_workers(self) -> Iterator[None]:
        """Inside the block all passes share workers and buffers, where the host has the memory for it."""
        if self.loader.buffer_bytes * self._processes_per_host > available_memory() * KEPT_BUFFERS_SHARE:
            yield
            return
        with self.loader.reusable() as passes:
            self._passes = passes
            try:
                yield
            finally:
                self._passes = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Raises UserError when a worker dies or there are more bad images than DATA.MAX_BAD_IMAGES."""
        with self.loader.started() if self._passes is None else nullcontext(next(self._passes)) as batches:
            for _ in range(len(self.loader)):
                with explain_worker_crash(self._num_workers):
                    batch = next(batches)
                self._bad.add(batch["bad"])
                if len(batch["image"]):
                    batch = self.loader.to_device(batch)
                    yield {"image": batch["image"], "target": batch["target"]}


def model_inputs(config: CfgNode) -> InputConfig:
    """Mean, standard deviation and the like of the model's images."""
    return timm_inputs(config.MODEL.NAME, config.DATA.IMG_SIZE) if config.MODEL.TYPE == "timm" else InputConfig()


def build_train_transform(config: CfgNode) -> Transform:
    """The reference transform of training images, from an RGB image to (3, S, S) float32, with the AUG keys."""
    aug, inputs = config.AUG, model_inputs(config)
    return train_transform(
        size=config.DATA.IMG_SIZE,
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
        interpolation=config.DATA.INTERPOLATION,
        mean=inputs.mean,
        std=inputs.std,
    )


def build_mixup(config: CfgNode, num_classes: int) -> Mixer | None:
    """Mixup and CutMix with the AUG keys, None when both are off. Raises UserError for an odd DATA.BATCH_SIZE."""
    aug = config.AUG
    if aug.MIXUP <= 0 and aug.CUTMIX <= 0 and aug.CUTMIX_MINMAX is None:
        return None
    return Mixer(
        seed=config.SEED,
        batch_size=config.DATA.BATCH_SIZE,
        num_classes=num_classes,
        mixup=aug.MIXUP,
        cutmix=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
    )


def build_eval_preset(config: CfgNode, weight_format: str = "original") -> EvalPreset:
    """The preset that TEST.PRESET names; for auto, the one of the code base that the weights come from.

    Args:
        weight_format: of the weights, as in `models.pretrained.load.LoadReport`; "original" for those trained here.

    Raises:
        UserError: TEST.PRESET does not fit the model.
    """
    kind, origin = config.MODEL.TYPE, config.TEST.PRESET
    if origin == "auto":
        origin = "timm" if kind == "timm" else weight_format if weight_format in ORIGINS else "original"
    torchvision_name = ""
    if kind in ("swin", "swinv2"):
        model = config.MODEL[kind.upper()]
        torchvision_name = TORCHVISION_NAMES.get((kind, model.EMBED_DIM, tuple(model.DEPTHS)), "")
    if origin != "original" and not config.TEST.CROP:
        log.warning("TEST.CROP False has no effect: the evaluation preset is %s (see TEST.PRESET)", origin)
    return eval_preset(
        origin,
        size=config.DATA.IMG_SIZE,
        crop=config.TEST.CROP,
        interpolation=config.DATA.INTERPOLATION,
        inputs=model_inputs(config),
        torchvision_name=torchvision_name,
    )


def _batch_loader(
    config: CfgNode,
    dist_info: DistInfo,
    samples: SampleFn,
    keys: BatchKeys,
    num_workers: int,
    as_bytes: bool = False,
) -> BatchLoader:
    """`as_bytes`: images are (S, S, 3) uint8, which the device augments; otherwise (3, S, S) float32."""
    size = config.DATA.IMG_SIZE
    image = ((size, size, 3), torch.uint8) if as_bytes else ((3, size, size), torch.float32)
    return BatchLoader(
        samples,
        keys,
        num_workers=num_workers,
        device=dist_info.device,
        pin_memory=config.DATA.PIN_MEMORY and dist_info.device.type == "cuda",
        batch_size=config.DATA.BATCH_SIZE,
        specs={"image": image},
    )
