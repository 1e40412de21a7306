"""What is optimised. An objective is a module that owns the model, turns a batch into a loss to train on, and a batch
into sums to evaluate with. The loop and DDP see the objective alone; another way of training is another objective.
"""

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F


class Classification(nn.Module):
    """Cross-entropy over classes.

    Training targets are class probabilities (B, classes) where Mixup or CutMix made them (label smoothing is in them
    already) and class numbers (B,) otherwise.
    """

    metrics = ("loss", "acc1", "acc5")
    main_metric = "acc1"

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.soft_loss = SoftTargetCrossEntropy()
        self.hard_loss = LabelSmoothingCrossEntropy(label_smoothing) if label_smoothing > 0 else nn.CrossEntropyLoss()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`image` (B, 3, H, W) and `target` → `loss`, the mean over the batch, and `output` (B, classes)."""
        output = self.model(batch["image"])
        target = batch["target"]
        with torch.autocast(output.device.type, enabled=False):
            loss = (self.soft_loss if target.ndim == 2 else self.hard_loss)(output.float(), target)
        return {"loss": loss, "output": output}

    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the images of an evaluation batch: `count`, `loss`, and 100 for each image right in `acc1`, `acc5`.

        With fewer than five classes `acc5` counts as many guesses as there are classes.
        """
        target = batch["target"]
        output = self.model(batch["image"]).float()
        guesses = output.topk(min(5, output.shape[1]), dim=1).indices
        right = guesses == target[:, None]
        return {
            "count": torch.ones_like(target, dtype=torch.float64).sum(),
            "loss": F.cross_entropy(output, target, reduction="none").double().sum(),
            "acc1": 100 * right[:, 0].double().sum(),
            "acc5": 100 * right.double().sum(),
        }
