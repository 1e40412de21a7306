"""A grid of images with captions, to check the network's input."""

import numpy as np
import torch
from PIL import Image, ImageDraw

_CAPTION = 12  # pixels


def captioned_grid(images: torch.Tensor, captions: list[str], columns: int = 8, tile: int = 96) -> torch.Tensor:
    """Draws images (B, 3, H, W), values in [0, 1], with captions below, as one image (3, height, width) in uint8."""
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * tile, rows * (tile + _CAPTION)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        left, top = index % columns * tile, index // columns * (tile + _CAPTION)
        grid.paste(Image.fromarray(pixels).resize((tile - 2, tile - 2)), (left, top))
        draw.text((left, top + tile - 2), caption[: tile // 6], fill="black")
    return torch.from_numpy(np.asarray(grid).copy()).permute(2, 0, 1)


def caption_of(target: torch.Tensor, class_names: list[str] | None) -> str:
    """Returns the label of a target, or of mixed images the two largest labels with their shares.

    Args:
        target: a class index (), or the weight of each class (num_classes,).
    """

    def name(index: int) -> str:
        return class_names[index] if class_names else str(index)

    if target.ndim == 0:
        return name(int(target))
    shares, indices = target.topk(min(2, len(target)))
    # Label smoothing gives every class a little: shares below 0.05 do not come from mixing.
    mixed = [(name(int(i)), float(s)) for i, s in zip(indices, shares, strict=True) if s > 0.05]
    return " ".join(f"{label}:{share:.1f}" if len(mixed) > 1 else label for label, share in mixed)
