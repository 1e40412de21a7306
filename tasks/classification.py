"""Image classification: cross-entropy over classes, top-1 and top-5 accuracy.

B images in a batch, K classes, S side of an image.
"""

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from models.trainable import TrainableModel
from tasks.task import Batch, Task
from utils.metrics import Sums
from utils.tracking.image_grid import caption_of, captioned_grid


class Classification(Task):
    """Cross-entropy over classes.

    Training targets are class probabilities (B, K) where Mixup or CutMix made them (they include the label smoothing),
    and class indices (B,) otherwise.
    """

    metrics = {"loss": False, "acc1": True, "acc5": True}
    main_metric = "acc1"

    def __init__(
        self,
        model: TrainableModel,
        label_smoothing: float = 0.0,
        *,
        input_shape: tuple[int, int, int] = (3, 224, 224),
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ):
        """
        Args:
            input_shape: (channels, height, width) of an image.
            class_names: by class index; None where unknown.
            mean, std: with which images are normalised, per channel.
        """
        super().__init__()
        self.model = model
        self.soft_loss = SoftTargetCrossEntropy()
        self.hard_loss = LabelSmoothingCrossEntropy(label_smoothing) if label_smoothing > 0 else nn.CrossEntropyLoss()
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.class_names = class_names
        self.mean, self.std = mean, std

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (B, 3, S, S) and `target` (B,) or (B, K) → `loss` and `output` (B, K)."""
        output = self.model(batch["image"])
        target = batch["target"]
        with torch.autocast(output.device.type, enabled=False):
            loss = (self.soft_loss if target.ndim == 2 else self.hard_loss)(output.float(), target)
        return {"loss": loss, "output": output}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (B, 3, S, S) → `output` (B, K) in float32."""
        return {"output": self.model(batch["image"]).float()}

    def evaluator(self, device: torch.device) -> "ClassificationEvaluator":
        return ClassificationEvaluator(device)

    def describe(self, metrics: dict[str, float]) -> str:
        formats = {"acc1": "top-1 {:.3f} %", "acc5": "top-5 {:.3f} %", "loss": "loss {:.4f}"}
        return "  ".join(text.format(metrics[name]) for name, text in formats.items() if name in metrics)

    def batch_image(self, batch: Batch) -> Tensor:
        """The first 32 images with their labels, or with the two strongest labels where images were mixed."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        images = batch["image"][:32].cpu() * std + mean
        return captioned_grid(images, [caption_of(target, self.class_names) for target in batch["target"][:32].cpu()])

    def example_batch(self, size: int, device: torch.device) -> Batch:
        """`image` (size, channels, S, S) and `target` (size, K), as Mixup makes them."""
        generator = torch.Generator(device).manual_seed(0)
        image = torch.randn(size, *self.input_shape, device=device, generator=generator)
        target = torch.rand(size, self.num_classes, device=device, generator=generator).softmax(1)
        return {"image": image, "target": target, "position": 0}


class ClassificationEvaluator:
    """Means over images of cross-entropy, top-1 and top-5 accuracy in percent.

    Each image counts once, so that neither the batch size nor the number of ranks matters. With fewer than five classes
    `acc5` counts as many guesses as there are classes.
    """

    def __init__(self, device: torch.device):
        self._sums = Sums(("images", *Classification.metrics), device)

    def add(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        output, target = outputs["output"], batch["target"]
        guesses = output.topk(min(5, output.shape[1]), dim=1).indices
        correct = guesses == target[:, None]
        self._sums.add(
            {
                "images": torch.ones_like(target, dtype=torch.float64).sum(),
                "loss": F.cross_entropy(output, target, reduction="none").double().sum(),
                "acc1": 100 * correct[:, 0].double().sum(),
                "acc5": 100 * correct.double().sum(),
            }
        )

    def result(self) -> dict[str, float]:
        sums = self._sums.take()
        images = sums.pop("images")
        return {"images": int(images)} | {name: total / max(images, 1) for name, total in sums.items()}
