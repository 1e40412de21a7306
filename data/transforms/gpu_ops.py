"""RandAugment's operations on batches of images, in torch, on any device. `data/native/augment.c` has the same for one.

n images of H × W pixels, N = H·W. No function reads a value from the device, so the host never waits for it.
"""

import torch
from torch import Tensor

# Pillow's cubic through four neighbours: the coefficients of 1, d, d², d³ in the weight of each.
_CUBIC = ((0.0, -1.0, 2.0, -1.0), (1.0, 0.0, -2.0, 1.0), (0.0, 1.0, 1.0, -1.0), (0.0, 0.0, -1.0, 1.0))


def luminance(images: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 → (n, H, W, 1) int32, as Pillow converts to grey."""
    red, green, blue = images.to(torch.int32).split(1, dim=3)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Interpolates from `start` to `end` by `factor` (n, 1, …), truncated to uint8: Pillow's blend, in float32."""
    start, end = start.to(torch.float32), end.to(torch.float32)
    return (start + factor * (end - start)).clamp_(0, 255).to(torch.uint8)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Color; images (n, H, W, 3) uint8, factor (n,)."""
    return blend(luminance(images), images, _per_image(factor))


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Sharpness. Border pixels do not change, because Pillow does not smooth them."""
    _, height, width, _ = images.shape
    if min(height, width) < 3:
        return images
    int_images = images.to(torch.int16)
    columns = int_images[:, :-2] + int_images[:, 1:-1] + int_images[:, 2:]
    inner = int_images[:, 1:-1, 1:-1]
    smooth = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * inner
    smooth = torch.div(smooth + 6, 13, rounding_mode="floor")
    result = images.clone()
    result[:, 1:-1, 1:-1] = blend(smooth, inner, _per_image(factor))
    return result


def _per_image(values: Tensor) -> Tensor:
    return values.to(torch.float32).view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------ look-up tables


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """images (n, H, W, 3) and tables (n, 3, 256), both uint8 → tables[i, c, images[i, y, x, c]]."""
    index = images.flatten(1, 2).transpose(1, 2).to(torch.int64)  # (n, 3, N)
    return tables.gather(2, index).transpose(1, 2).view(images.shape)


def contrast_tables(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Contrast: blends with the mean of the grey image."""
    grey = luminance(images).flatten(1)
    mean = (grey.sum(1, dtype=torch.int64).to(torch.float64) / grey.shape[1] + 0.5).floor()
    values = torch.arange(256, device=images.device).expand(len(images), 256)
    tables = blend(mean[:, None], values, factor.to(torch.float32)[:, None])
    return tables[:, None].expand(-1, 3, -1)


def auto_contrast_tables(images: Tensor) -> Tensor:
    """ImageOps.autocontrast: stretches each channel to 0…255."""
    flat = images.flatten(1, 2)
    low, high = (each.to(torch.float64)[:, :, None] for each in (flat.amin(1), flat.amax(1)))
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = torch.full_like(high, 255.0) / (high - low)  # a Python number divided by a tensor would be rounded twice
    stretched = (values * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """ImageOps.equalize: flattens each channel's histogram, in integers."""
    flat = images.flatten(1, 2).transpose(1, 2).to(torch.int64)  # (n, 3, N)
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand(flat.shape)
    count = torch.zeros((len(images), 3, 256), dtype=torch.int32, device=images.device).scatter_add_(2, flat, ones)
    values = torch.arange(256, device=images.device)
    last = ((count > 0) * values).amax(2, keepdim=True)
    step = torch.div(flat.shape[2] - count.gather(2, last), 255, rounding_mode="floor")
    before = count.cumsum(2) - count + torch.div(step, 2, rounding_mode="floor")
    flattened = torch.div(before, step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    return torch.where(step > 0, flattened, values).to(torch.uint8)


# ------------------------------------------------------------------------------------------------ affine transforms


def affine(images: Tensor, matrix: Tensor, cubic: Tensor, fill: Tensor) -> Tensor:
    """Image.transform with an affine matrix. Positions are float64, as in Pillow; values are float32.

    Args:
        images: (n, H, W, 3) uint8.
        matrix: (n, 6) float64, from output positions to source positions.
        cubic: (n,) bool, else linear.
        fill: (n, 3), the colour of pixels sampled outside the source.
    """
    n, height, width, _ = images.shape
    source_x, source_y = _source_positions(images, matrix)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    (first_x, weights_x), (first_y, weights_y) = (_weights(source, cubic) for source in (source_x, source_y))
    columns = [(first_x + i).clamp_(0, width - 1) for i in range(4)]
    flat, rows = images.view(n, -1, 3), []
    for j in range(4):
        row = (first_y + j).clamp_(0, height - 1) * width
        taps = [_gather_pixels(flat, row + column).view(images.shape).to(torch.float32) for column in columns]
        rows.append(_weighted_sum(taps, weights_x))
    return _fill_outside(_weighted_sum(rows, weights_y), inside, fill)


def shift_rows(images: Tensor, matrix: Tensor, cubic: Tensor, fill: Tensor) -> Tensor:
    """`affine` for matrices (1, a1, a2, 0, 1, 0): each row is shifted along itself, with its own weights."""
    a = matrix.unsqueeze(2)
    y = torch.arange(images.shape[1], dtype=torch.float64, device=images.device) + 0.5
    return _sample_rows(images, a[:, 1] * y + a[:, 2], cubic, fill)


def shift_columns(images: Tensor, matrix: Tensor, cubic: Tensor, fill: Tensor) -> Tensor:
    """`affine` for matrices (1, 0, 0, a3, 1, a5): each column is shifted along itself."""
    a = matrix.unsqueeze(2)
    x = torch.arange(images.shape[2], dtype=torch.float64, device=images.device) + 0.5
    return _sample_rows(images.transpose(1, 2), a[:, 3] * x + a[:, 5], cubic, fill).transpose(1, 2)


def nearest(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Samples the nearest pixel. Used for quarter turns, where each position is the centre of a pixel."""
    n, height, width, _ = images.shape
    source_x, source_y = (each.floor().to(torch.int64) for each in _source_positions(images, matrix))
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = source_y.clamp_(0, height - 1) * width + source_x.clamp_(0, width - 1)
    return _fill_outside(_gather_pixels(images.view(n, -1, 3), index).view(images.shape), inside, fill)


def _source_positions(images: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Source positions x and y of each output pixel: (n, H, W) float64."""
    n, height, width, _ = images.shape
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    a = [each.view(n, 1, 1) for each in matrix.unbind(1)]
    return a[0] * x + a[1] * y + a[2], a[3] * x + a[4] * y + a[5]


def _sample_rows(images: Tensor, shifts: Tensor, cubic: Tensor, fill: Tensor) -> Tensor:
    """Samples row y of image i at x + shifts[i, y]; shifts (n, H) float64."""
    width = images.shape[2]
    first, weights = _weights(shifts[:, :, None] + 0.5, cubic)  # of pixel 0; those of the others differ by whole pixels
    index = torch.arange(width + 3, device=images.device) + first
    padded = images.gather(2, index.clamp_(0, width - 1)[..., None].expand(-1, -1, -1, 3)).to(torch.float32)
    values = _weighted_sum([padded[:, :, i : i + width] for i in range(4)], weights)
    x = torch.arange(width, device=images.device) + 0.5
    source = shifts[:, :, None]
    return _fill_outside(values, (x >= -source) & (x < width - source), fill)


def _weights(source: Tensor, cubic: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Along one axis: the index of the first of the four neighbours of each position, and the weights of the four."""
    source = source - 0.5
    second = source.floor()
    d = (source - second).to(torch.float32)[..., None]
    cubic = cubic.view(-1, 1, 1, 1)
    linear = (torch.zeros_like(d), 1 - d, d, torch.zeros_like(d))
    curve = (k0 + d * (k1 + d * (k2 + d * k3)) for k0, k1, k2, k3 in _CUBIC)
    return second.to(torch.int64) - 1, [torch.where(cubic, *each) for each in zip(curve, linear, strict=True)]


def _gather_pixels(flat: Tensor, index: Tensor) -> Tensor:
    """flat (n, N, 3), index (n, H, W) → (n, N, 3)."""
    return flat.gather(1, index.view(len(flat), -1, 1).expand(-1, -1, 3))


def _weighted_sum(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The second of four values plus the weighted differences from it. If all four are equal, the sum is exact."""
    total = values[1].clone()
    for i in (0, 2, 3):
        total.addcmul_(values[i] - values[1], weights[i])
    return total


def _fill_outside(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    return torch.where(inside[..., None], values.clamp(0, 255).to(torch.uint8), fill.to(torch.uint8)[:, None, None])


# ------------------------------------------------------------------------------------------------ erasing


def erase(images: Tensor, index: Tensor, *, areas: Tensor, pixels: int, seeds: Tensor, noise: str) -> None:
    """Erases one rectangle in each of n images, in place.

    Args:
        images: (B, 3, H, W) float32, normalised.
        index: (n,) int64, the images to erase from.
        areas: (n, 4) int64 top, left, height, width.
        pixels: the sum of height × width. The host computes it, so that it is not read from the device.
        seeds: (n,) int64. The noise depends only on an image's seed and on the pixel.
        noise: "pixel": normal noise for each value; "rand": for each channel; "const": zero.
    """
    device, channels = images.device, images.shape[1]
    top, left, _, widths = areas.unbind(1)
    sizes = areas[:, 2] * areas[:, 3]
    rectangle = torch.repeat_interleave(torch.arange(len(areas), device=device), sizes, output_size=pixels)
    place = torch.arange(pixels, device=device) - (sizes.cumsum(0) - sizes)[rectangle]
    row, column = torch.div(place, widths[rectangle], rounding_mode="floor"), place % widths[rectangle]
    where = (index[rectangle], slice(None), top[rectangle] + row, left[rectangle] + column)
    if noise == "const":
        images[where] = 0.0
        return
    channel = torch.arange(channels, device=device)
    counter = channel if noise == "rand" else place[:, None] * channels + channel
    images[where] = normal(seeds[rectangle][:, None], counter).to(images.dtype)


def normal(seed: Tensor, counter: Tensor) -> Tensor:
    """Standard normal float32 as a function of (seed, counter), int64, with the Box-Muller transform.

    The random bits are those of SplitMix64 (Steele, Lea, Flood 2014), a hash of a counter without state.
    """
    bits = seed + (counter + 1) * _to_int64(0x9E3779B97F4A7C15)
    bits = (bits ^ _shift_right(bits, 30)) * _to_int64(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _to_int64(0x94D049BB133111EB)
    bits = bits ^ _shift_right(bits, 31)
    radius = (_shift_right(bits, 40).to(torch.float32) + 1) * 2.0**-24  # above 0, up to 1
    angle = (bits & 0xFFFFFF).to(torch.float32) * (2 * torch.pi * 2.0**-24)
    return (-2 * radius.log()).sqrt() * angle.cos()


def _to_int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Shifts to the right and fills with zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
