"""Pictures of what the network is fed."""

import numpy as np
import torch
from PIL import Image, ImageDraw

_CAPTION = 12  # pixels


def captioned_grid(images: torch.Tensor, captions: list[str], columns: int = 8, tile: int = 96) -> torch.Tensor:
    """Images (B, 3, H, W) in 0…1 side by side with their captions below, as one picture (3, height, width) in uint8."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * tile, rows * (tile + _CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        left, top = index % columns * tile, index // columns * (tile + _CAPTION)
        sheet.paste(Image.fromarray(pixels).resize((tile - 2, tile - 2)), (left, top))
        pen.text((left, top + tile - 2), caption[: tile // 6], fill="black")
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1)


def caption_of(target: torch.Tensor, class_names: list[str] | None) -> str:
    """The label, or the two strongest labels with their shares where images were mixed."""

    def name(index: int) -> str:
        return class_names[index] if class_names else str(index)

    if target.ndim == 0:
        return name(int(target))
    shares, indices = target.topk(min(2, len(target)))
    # Label smoothing gives every class a little: what is below a twentieth was not mixed in.
    strong = [(name(int(i)), float(s)) for i, s in zip(indices, shares, strict=True) if s > 0.05]
    return " ".join(f"{label}:{share:.1f}" if len(strong) > 1 else label for label, share in strong)
