"""The way into `data/`, and its only file that reads the configuration: data sets, training and validation batches.

B images of a micro-batch, K classes, S image size.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data.datasets import base as datasets
from data.datasets.base import Images
from data.datasets.digits import write_demo
from data.datasets.packed import LAYOUT as LAYOUT_PACKED
from data.datasets.packed import open_packed
from data.datasets.validate import check_imagenet_order, check_num_classes, check_num_workers, check_same_classes
from data.loader.loader import BadImageCount, BatchLoader, EvalSamples, TrainSamples, explain_worker_crash
from data.loader.sampler import StreamSampler, eval_indices
from data.transforms.eval_presets import EvalPreset, InputConfig, eval_preset, timm_inputs
from data.transforms.mixup import Mixer
from data.transforms.native_transforms import GpuTrainTransform, prepare_eval, prepare_train
from data.transforms.reference import train_transform
from utils.distributed.process_group import DistInfo, local_rank_zero_first
from utils.errors import UserError
from utils.origins import ORIGINS, TORCHVISION_NAMES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The data of a run. `train` is None when only evaluating; `class_names` is by label, None when unknown."""

    train: Images | None
    val: Images
    num_classes: int
    class_names: list[str] | None


def build_datasets(config: CfgNode, dist_info: DistInfo) -> Data:
    """Opens the data that the configuration names and checks them. On each machine one process goes first, so that
    what is written once (index, demo, download) is there for the others.

    Raises:
        UserError: the data are missing, of another layout, have another number of classes than MODEL.NUM_CLASSES,
            other classes in train than in val, or ImageNet-1K's classes in another order.
    """
    root = _data_path(config)
    check_num_workers(config.DATA.NUM_WORKERS, dist_info.local_world_size)
    with local_rank_zero_first(dist_info):
        train = None if config.EVAL_MODE else _open(config, root, "train", dist_info)
        val = _open(config, root, "val", dist_info)
    what = f"DATA.DATA_PATH {root}"
    if train is not None:
        check_same_classes(train.class_names, val.class_names, train.num_classes, val.num_classes, what)
    if config.DATA.DATASET in ("imagenet", "packed"):
        for images, split in ((train, "train"), (val, "val")):
            if images is not None and images.class_names is not None:
                check_imagenet_order(images.class_names, f"{what}, {split}")
    num_classes = check_num_classes(val.num_classes, config.MODEL.NUM_CLASSES, what)
    class_names = val.class_names if train is None or train.class_names is None else train.class_names
    return Data(train, val, num_classes, class_names)


def _data_path(config: CfgNode) -> Path:
    name, path = config.DATA.DATASET, config.DATA.DATA_PATH
    layouts = {"imagenet": datasets.LAYOUT_FOLDER, "imagenet22K": datasets.LAYOUT_22K, "packed": LAYOUT_PACKED}
    layout = datasets.LAYOUT_ZIP if config.DATA.ZIP_MODE else layouts.get(name, "{root}, a folder to download to")
    if not path:
        raise UserError(f"DATA.DATA_PATH is empty: give --data-path DIR. Expected {layout.format(root='DIR')}.")
    root = Path(path).expanduser()
    if not root.is_dir() and name in layouts:
        raise UserError(f"DATA.DATA_PATH (--data-path): no folder {root}. Expected {layout.format(root=root)}.")
    return root


def _open(config: CfgNode, root: Path, split: str, dist_info: DistInfo) -> Images:
    name = config.DATA.DATASET
    if config.DATA.ZIP_MODE:
        # As in the original, validation images are never copied into memory: they are read once an epoch.
        mode = "part" if split == "val" and config.DATA.CACHE_MODE == "full" else config.DATA.CACHE_MODE
        return datasets.open_zip(root, split, mode, dist_info.local_rank, dist_info.local_world_size)
    if name == "demo":
        write_demo(root)
    if name == "packed":
        return open_packed(root, split)
    if name in ("imagenet", "demo"):
        return datasets.open_folder(root, split)
    if name == "imagenet22K":
        return datasets.open_imagenet_22k(root, split)
    return datasets.open_timm(name, root, is_training=split == "train")


class TrainBatches:
    """This process's micro-batches of the training stream from `start_samples` to `stop_samples`, on its device.

    Yields {'image': (B, 3, S, S) float32, 'target': (B,) int64, or (B, K) float32 when mixing, 'position': stream
    position of the first sample}. The workers live as long as the iteration and fill ahead across epochs.

    Attributes:
        wait_seconds: time spent waiting for batches so far.
        bad_images: different images met so far that could not be used, in this process.
        loader: what gives batches in the memory of this machine, before anything is on the device.
    """

    def __init__(self, config: CfgNode, data: Data, dist_info: DistInfo, start_samples: int, stop_samples: int):
        """Raises UserError for an odd DATA.BATCH_SIZE with mixing, ValueError if start to stop is not whole updates."""
        if data.train is None:
            raise ValueError("the data were opened for evaluation only")
        aug, batch_size, inputs = config.AUG, config.DATA.BATCH_SIZE, model_inputs(config)
        transform = train_transform(
            config.DATA.IMG_SIZE,
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
        prepare = prepare_train(config.DATA.BACKEND, transform)
        self._augment = prepare.augment if isinstance(prepare, GpuTrainTransform) else None
        samples = TrainSamples(data.train, prepare, config.SEED, config.DATA.MAX_BAD_IMAGES)
        self.wait_seconds = 0.0
        self._first = data.train.path(0)
        self._batch_size = batch_size
        self._num_workers = config.DATA.NUM_WORKERS
        self._mixer = _mixer(config, data.num_classes)
        self._bad = BadImageCount(config.DATA.MAX_BAD_IMAGES, "replaced by the next good one")
        self._sampler = StreamSampler(
            len(data.train), config.SEED, batch_size, dist_info.rank, dist_info.world_size, start_samples, stop_samples
        )
        on_device = self._augment is not None
        self.loader = _batch_loader(config, dist_info, samples, self._sampler, self._num_workers, on_device)

    @property
    def bad_images(self) -> int:
        return len(self._bad.seen)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor | int]]:
        """Raises UserError when a worker dies or images are bad beyond DATA.MAX_BAD_IMAGES."""
        with self.loader.started() as batches:
            for position in self._sampler.positions:
                asked = time.perf_counter()
                with explain_worker_crash(self._num_workers):
                    batch = next(batches)
                self.wait_seconds += time.perf_counter() - asked
                self._bad.add(batch["bad"])
                if len(batch["target"]) < self._batch_size:
                    raise UserError(
                        "DATA.DATA_PATH: not one of the training images can be read, such as "
                        f"{self._first}. Check them."
                    )
                image, target = self.loader.to_device(batch)
                if self._augment is not None:
                    image = self._augment(image, batch["draws"])
                if self._mixer is not None:
                    image, target = self._mixer(image, target, position)
                yield {"image": image, "target": target, "position": position}


class ValBatches:
    """This process's share of the validation images, each once, on its device; can be gone through again and again.

    Yields {'image': (B, 3, S, S) float32, 'target': (B,) int64}; B varies (the last batch, and bad images left out).
    Workers are started for each pass and end with it.

    Attributes:
        bad_images: different images met so far that could not be used, in this process.
        loader: what gives batches in the memory of this machine, before anything is on the device.
    """

    def __init__(self, config: CfgNode, data: Data, dist_info: DistInfo, layout: str):
        batch_size = config.DATA.BATCH_SIZE
        indices = eval_indices(len(data.val), dist_info.rank, dist_info.world_size)
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        chosen = _eval_preset(config, layout)
        log.info("validation images are prepared as by %s: %s", chosen.origin, chosen.description)
        self._num_workers = min(config.DATA.NUM_WORKERS, len(batches))
        self._bad = BadImageCount(config.DATA.MAX_BAD_IMAGES, "left out")
        samples = EvalSamples(data.val, prepare_eval(config.DATA.BACKEND, chosen.transform))
        self.loader = _batch_loader(config, dist_info, samples, batches, self._num_workers)

    @property
    def bad_images(self) -> int:
        return len(self._bad.seen)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Raises UserError when a worker dies or images are bad beyond DATA.MAX_BAD_IMAGES."""
        with self.loader.started() as batches:
            for _ in range(len(self.loader)):
                with explain_worker_crash(self._num_workers):
                    batch = next(batches)
                self._bad.add(batch["bad"])
                if batch["image"] is None:
                    continue
                image, target = self.loader.to_device(batch)
                yield {"image": image, "target": target}


def val_batches(config: CfgNode, data: Data, dist_info: DistInfo, layout: str = "original") -> ValBatches:
    """The validation images, prepared as TEST.PRESET says; where that is auto, as whoever made the weights does.

    Args:
        layout: that of the weights to evaluate, as `models.pretrained.load.LoadReport` says; "original" for those trained here.

    Raises:
        UserError: TEST.PRESET does not go with the model.
    """
    return ValBatches(config, data, dist_info, layout)


def model_inputs(config: CfgNode) -> InputConfig:
    """Mean, standard deviation and the like of the model's images."""
    return timm_inputs(config.MODEL.NAME, config.DATA.IMG_SIZE) if config.MODEL.TYPE == "timm" else InputConfig()


def _eval_preset(config: CfgNode, layout: str) -> EvalPreset:
    kind, origin = config.MODEL.TYPE, config.TEST.PRESET
    if origin == "auto":
        origin = "timm" if kind == "timm" else layout if layout in ORIGINS else "original"
    torchvision_name = ""
    if kind in ("swin", "swinv2"):
        model = config.MODEL[kind.upper()]
        torchvision_name = TORCHVISION_NAMES.get((kind, model.EMBED_DIM, tuple(model.DEPTHS)), "")
    size, crop, interpolation = config.DATA.IMG_SIZE, config.TEST.CROP, config.DATA.INTERPOLATION
    if origin != "original" and not crop:
        log.warning("TEST.CROP False has no effect: images are prepared as by %s (see TEST.PRESET)", origin)
    return eval_preset(
        origin,
        size,
        crop=crop,
        interpolation=interpolation,
        inputs=model_inputs(config),
        torchvision_name=torchvision_name,
    )


def _mixer(config: CfgNode, num_classes: int) -> Mixer | None:
    aug = config.AUG
    if aug.MIXUP <= 0 and aug.CUTMIX <= 0 and aug.CUTMIX_MINMAX is None:
        return None
    return Mixer(
        config.SEED,
        config.DATA.BATCH_SIZE,
        num_classes,
        mixup=aug.MIXUP,
        cutmix=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
    )


def _batch_loader(
    config: CfgNode,
    dist_info: DistInfo,
    samples: Dataset,
    keys: Sequence[list] | StreamSampler,
    num_workers: int,
    on_device: bool = False,
) -> BatchLoader:
    """`on_device`: images are sent as bytes, for the device to augment."""
    size, pin_memory = config.DATA.IMG_SIZE, config.DATA.PIN_MEMORY and dist_info.device.type == "cuda"
    shape, dtype = ((size, size, 3), torch.uint8) if on_device else ((3, size, size), torch.float32)
    return BatchLoader(samples, keys, num_workers, dist_info.device, pin_memory, config.DATA.BATCH_SIZE, shape, dtype)
