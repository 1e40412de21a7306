"""Mixup and CutMix as a function of where in the stream a micro-batch begins.

B images of a micro-batch, K classes.
"""

import numpy as np
from timm.data import Mixup
from torch import Tensor

from utils.errors import UserError
from utils.seed import derive


class Mixer:
    """timm's Mixup/CutMix, drawing from a generator seeded by (seed, position) alone. Works on any device."""

    def __init__(
        self,
        seed: int,
        batch_size: int,
        num_classes: int,
        mixup: float,
        cutmix: float,
        cutmix_minmax: tuple[float, float] | None,
        prob: float,
        switch_prob: float,
        mode: str,
        label_smoothing: float,
    ):
        """The last seven are those of timm's Mixup. Raises UserError when `batch_size` is odd: images mix in pairs."""
        if batch_size % 2:
            raise UserError(
                f"Mixup and CutMix mix pairs of images, so DATA.BATCH_SIZE must be even, not {batch_size}. Change it "
                f"(--batch-size {batch_size + 1}), or switch both off: --opts AUG.MIXUP 0 AUG.CUTMIX 0"
            )
        self.seed = seed
        self.mixup = Mixup(
            mixup,
            cutmix,
            cutmix_minmax,
            prob,
            switch_prob,
            mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, image: Tensor, target: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Mixes `image` (B, 3, H, W) in place; `target` (B,) int64 becomes (B, K) float32, smoothed.

        numpy's global generator, which timm draws from, is left as it was found.
        """
        found = np.random.get_state()
        np.random.seed(derive(self.seed, "mix", position) & 0xFFFFFFFF)
        try:
            return self.mixup(image, target)
        finally:
            np.random.set_state(found)
