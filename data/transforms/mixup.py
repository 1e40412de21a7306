"""Mixup and CutMix, as a function of the stream position at which a micro-batch begins.

B images of a micro-batch, K classes.
"""

import numpy as np
from timm.data import Mixup
from torch import Tensor

from utils.errors import UserError
from utils.seed import derive


class Mixer:
    """timm's Mixup and CutMix with random numbers that depend only on (seed, position). Works on any device."""

    def __init__(
        self,
        seed: int,
        batch_size: int,
        num_classes: int,
        *,
        mixup: float,
        cutmix: float,
        cutmix_minmax: tuple[float, float] | None,
        prob: float,
        switch_prob: float,
        mode: str,
        label_smoothing: float,
    ):
        """The keyword arguments are those of timm's Mixup. Raises UserError if `batch_size` is odd."""
        if batch_size % 2:
            raise UserError(
                f"Mixup and CutMix mix pairs of images, so DATA.BATCH_SIZE must be even, not {batch_size}. Change it "
                f"(--batch-size {batch_size + 1}), or turn both off: --opts AUG.MIXUP 0 AUG.CUTMIX 0"
            )
        self.seed = seed
        self.mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, image: Tensor, target: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Mixes `image` (B, 3, H, W) in place; `target` (B,) int64 becomes (B, K) float32, smoothed.

        timm uses numpy's global generator; its state is restored afterwards.
        """
        state = np.random.get_state()
        np.random.seed(derive(self.seed, "mix", position) & 0xFFFFFFFF)
        try:
            return self.mixup(image, target)
        finally:
            np.random.set_state(state)
