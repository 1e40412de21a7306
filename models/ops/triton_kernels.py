"""The Triton kernels of window attention. `triton_attention.py` starts them; right is what `reference.py` says.

Nothing is moved to form windows: a program computes where the tokens of its window lie in the unsplit projection
(B, H, W, 3, nH, d) after the cyclic shift, and reads and writes them there. The mask is computed from those places too.

A program belongs to one head and one block of `BLOCK` of the window's N queries (in `backward_keys`: of its keys). It
keeps that block's part of the position bias, and in the backward pass of the bias's gradient, in registers, and goes
through its share of the windows of all images: every `gridDim.z`-th. In the backward pass all N tokens of the other
side are one tile of `FULL`; where BLOCK = FULL, both sides are, and a window is read once. Nothing but the input is
kept for it: probabilities are computed again. Gradients that are sums over windows are written once for each program,
and added up afterwards.

Scores are in units of log 2, in which exponentials are cheapest: x·log2(e) stands for x.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
APART = tl.constexpr(-100.0)  # as `models.ops.window.MASKED`: for a pair that the shift brought together


@triton.constexpr_function
def _tile(rest, largest):
    """The width of the next tile where `rest` tokens are left: a power of 2, as tiles have to be."""
    return max(16, min(largest, triton.next_power_of_2(rest)))


@triton.jit
def _product(a, b):
    """Matrix product, summed up in float32; of float32 by three products of its upper and lower bits."""
    if INTERPRETED:  # the interpreter multiplies no bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _region(place, length, shift):
    """As `models.ops.window.region_ids`: 0 the bulk of an axis, 1 what the shift brought from its other end, 2 padding."""
    return tl.where(place >= length, 2, tl.where(place < shift, 1, 0))


@triton.jit
def _places(tokens, window, across, H, W, H_padded, W_padded, down, right, M: tl.constexpr, MASKED: tl.constexpr):
    """Where tokens of a window lie: place in the map (y·W + x), whether they lie in it, and their region.

    Only tokens of one region see each other.
    """
    y = window // across * M + tokens // M
    x = window % across * M + tokens % M
    here = tokens < M * M
    region = tokens * 0
    if MASKED:
        y += down
        x += right
        y = tl.where(y >= H_padded, y - H_padded, y)
        x = tl.where(x >= W_padded, x - W_padded, x)
        here = here & (y < H) & (x < W)
        region = _region(y, H, down) * 3 + _region(x, W, right)
    return y * W + x, here, region


@triton.jit
def _read(base, places, here, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """(tokens, WIDTH): D values of each token at `places`, then zeros; zeros for tokens that are not there."""
    columns = tl.arange(0, WIDTH)
    mask = here[:, None] if WIDTH == D else here[:, None] & (columns < D)[None, :]
    return tl.load(base + places[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _write(base, places, here, stride, values, D: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = here[:, None] if WIDTH == D else here[:, None] & (columns < D)[None, :]
    tl.store(base + places[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _unit(x):
    """Vectors (tokens, WIDTH) at length 1, in their type, and the factors (tokens,), in float32, that made them so."""
    accumulate_dtype = x.to(tl.float32)
    factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(accumulate_dtype * accumulate_dtype, 1)), 1e-12)
    return (accumulate_dtype * factor[:, None]).to(x.dtype), factor


@triton.jit
def _bias(bias, head, rows, columns, N: tl.constexpr):
    """The bias of the pairs (rows, columns) in units of log 2; -inf where there is no such key, 0 for no such query."""
    mask = (rows < N)[:, None] & (columns < N)[None, :]
    tile = tl.load(bias + head * N * N + rows[:, None] * N + columns[None, :], mask=mask, other=0.0) * LOG2E
    return tl.where((columns < N)[None, :], tile, float("-inf"))


@triton.jit
def _scores(q, k, bias, factor, regions_q, regions_k, MASKED: tl.constexpr):
    """(queries, keys) in units of log 2. `factor` is log2(e) times that of the products."""
    scores = _product(q, tl.trans(k)) * factor + bias
    if MASKED:
        scores += tl.where(regions_q[:, None] != regions_k[None, :], APART * LOG2E, 0.0)
    return scores


@triton.jit
def _back_through_unit(gradient, unit, factor):
    """The gradient of x, given that of `unit`, x at length 1: what lies along x has no effect."""
    unit = unit.to(tl.float32)
    return (gradient - unit * tl.sum(unit * gradient, 1)[:, None]) * factor[:, None]


@triton.jit
def forward(
    qkv, bias, scales, factor, out,  # (B, H, W, 3, nH, d), (nH, N, N), (nH,) where COSINE, to (B, H, W, C)
    windows, per_image, across, H, W, H_padded, W_padded, down, right, C,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    MASKED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """As in Flash Attention, keys and values come tile by tile, and what was summed up is scaled by the new maximum."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_tiles = ()
    for start in tl.static_range(0, M * M, BLOCK):
        columns = start + tl.arange(0, _tile(M * M - start, BLOCK))
        bias_tiles += (_bias(bias, head, rows, columns, M * M),)
    if COSINE:
        factor = tl.load(scales + head)
    for i in tl.range(tl.program_id(2), windows, tl.num_programs(2)):
        window = i % per_image
        image = (i // per_image).to(tl.int64) * H * W
        places, here, regions = _places(rows, window, across, H, W, H_padded, W_padded, down, right, M, MASKED)
        base = qkv + image * 3 * C + head * D
        q = _read(base, places, here, 3 * C, D, WIDTH)
        if COSINE:
            q, _ = _unit(q)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        result = tl.zeros((BLOCK, WIDTH), tl.float32)
        for start in tl.static_range(0, M * M, BLOCK):
            places_k, here_k, regions_k = places, here, regions
            if BLOCK < FULL:
                columns = start + tl.arange(0, _tile(M * M - start, BLOCK))
                places_k, here_k, regions_k = _places(
                    columns, window, across, H, W, H_padded, W_padded, down, right, M, MASKED
                )
            k = _read(base + C, places_k, here_k, 3 * C, D, WIDTH)
            v = _read(base + 2 * C, places_k, here_k, 3 * C, D, WIDTH)
            if COSINE:
                k, _ = _unit(k)
            scores = _scores(q, k, bias_tiles[start // BLOCK], factor * LOG2E, regions, regions_k, MASKED)
            new = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new[:, None])
            shrink = tl.exp2(largest - new)
            total = total * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + _product(weights.to(v.dtype), v)
            largest = new
        _write(out + image * C + head * D, places, here, C, result / total[:, None], D, WIDTH)


@triton.jit
def backward_queries(
    gradient, qkv, bias, scales, factor,  # (B, H, W, C), then as in `forward`
    grad_qkv, grad_bias, grad_scales,  # (B, H, W, 3, nH, d), (programs, nH, N, N), (programs, blocks, nH)
    statistics,  # (windows, nH, 2, N), for `backward_keys`: log2 of the softmax's denominator, and Σ weight · gradient
    windows, per_image, across, H, W, H_padded, W_padded, down, right, C,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    MASKED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, the bias and the scales; of keys and values too where one tile is all."""
    head = tl.program_id(0)
    N: tl.constexpr = M * M
    columns = tl.arange(0, FULL)
    rows = columns
    if BLOCK < FULL:
        rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_tile = _bias(bias, head, rows, columns, N)
    bias_sum = tl.zeros((BLOCK, FULL), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    if COSINE:
        factor = tl.load(scales + head)
    for i in tl.range(tl.program_id(2), windows, tl.num_programs(2)):
        window = i % per_image
        image = (i // per_image).to(tl.int64) * H * W
        places, here, regions = _places(rows, window, across, H, W, H_padded, W_padded, down, right, M, MASKED)
        places_k, here_k, regions_k = places, here, regions
        if BLOCK < FULL:
            places_k, here_k, regions_k = _places(
                columns, window, across, H, W, H_padded, W_padded, down, right, M, MASKED
            )
        base = qkv + image * 3 * C + head * D
        q = _read(base, places, here, 3 * C, D, WIDTH)
        k = _read(base + C, places_k, here_k, 3 * C, D, WIDTH)
        v = _read(base + 2 * C, places_k, here_k, 3 * C, D, WIDTH)
        arriving = _read(gradient + image * C + head * D, places, here, C, D, WIDTH)
        if COSINE:
            q, factor_q = _unit(q)
            k, factor_k = _unit(k)
        scores = _scores(q, k, bias_tile, factor * LOG2E, regions, regions_k, MASKED)
        largest = tl.max(scores, 1)
        weights = tl.exp2(scores - largest[:, None])
        total = tl.sum(weights, 1)
        weights *= (1.0 / total)[:, None]
        grad_weights = _product(arriving, tl.trans(v))
        mean = tl.sum(weights * grad_weights, 1)
        grad_scores = weights * (grad_weights - mean[:, None])
        bias_sum += grad_scores
        small = grad_scores.to(q.dtype)
        grad_q = _product(small, k)
        if COSINE:
            scale_sum += tl.sum(grad_q * q.to(tl.float32), 1)
            grad_q = _back_through_unit(grad_q, q, factor_q)
        target = grad_qkv + image * 3 * C + head * D
        _write(target, places, here, 3 * C, grad_q * factor, D, WIDTH)
        if BLOCK == FULL:
            grad_v = _product(tl.trans(weights.to(v.dtype)), arriving)
            _write(target + 2 * C, places_k, here_k, 3 * C, grad_v, D, WIDTH)
            grad_k = _product(tl.trans(small), q)
            if COSINE:
                grad_k = _back_through_unit(grad_k, k, factor_k)
            _write(target + C, places_k, here_k, 3 * C, grad_k * factor, D, WIDTH)
        else:
            kept = statistics + (i * tl.num_programs(0).to(tl.int64) + head) * 2 * N + rows
            tl.store(kept, largest + tl.log2(total), mask=rows < N)
            tl.store(kept + N, mean, mask=rows < N)
    share = tl.program_id(2) * tl.num_programs(0) + head
    mask = (rows < N)[:, None] & (columns < N)[None, :]
    tl.store(grad_bias + share * N * N + rows[:, None] * N + columns[None, :], bias_sum, mask=mask)
    if COSINE:
        block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + head
        tl.store(grad_scales + block, tl.sum(scale_sum, 0))


@triton.jit
def backward_keys(
    gradient, qkv, bias, scales, factor, grad_qkv, statistics,  # as in `backward_queries`
    windows, per_image, across, H, W, H_padded, W_padded, down, right, C,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    MASKED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, from the statistics that `backward_queries` has left."""
    head = tl.program_id(0)
    N: tl.constexpr = M * M
    rows = tl.arange(0, FULL)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_tile = _bias(bias, head, rows, columns, N)
    if COSINE:
        factor = tl.load(scales + head)
    for i in tl.range(tl.program_id(2), windows, tl.num_programs(2)):
        window = i % per_image
        image = (i // per_image).to(tl.int64) * H * W
        places, here, regions = _places(rows, window, across, H, W, H_padded, W_padded, down, right, M, MASKED)
        places_k, here_k, regions_k = places, here, regions
        if BLOCK < FULL:
            places_k, here_k, regions_k = _places(
                columns, window, across, H, W, H_padded, W_padded, down, right, M, MASKED
            )
        base = qkv + image * 3 * C + head * D
        q = _read(base, places, here, 3 * C, D, WIDTH)
        k = _read(base + C, places_k, here_k, 3 * C, D, WIDTH)
        v = _read(base + 2 * C, places_k, here_k, 3 * C, D, WIDTH)
        arriving = _read(gradient + image * C + head * D, places, here, C, D, WIDTH)
        if COSINE:
            q, _ = _unit(q)
            k, factor_k = _unit(k)
        kept = statistics + (i * tl.num_programs(0).to(tl.int64) + head) * 2 * N + rows
        total = tl.load(kept, mask=rows < N, other=0.0)
        mean = tl.load(kept + N, mask=rows < N, other=0.0)
        scores = _scores(q, k, bias_tile, factor * LOG2E, regions, regions_k, MASKED)
        weights = tl.exp2(scores - total[:, None])
        target = grad_qkv + image * 3 * C + head * D
        grad_v = _product(tl.trans(weights.to(v.dtype)), arriving)
        _write(target + 2 * C, places_k, here_k, 3 * C, grad_v, D, WIDTH)
        grad_scores = weights * (_product(arriving, tl.trans(v)) - mean[:, None])
        grad_k = _product(tl.trans(grad_scores.to(q.dtype)), q)
        if COSINE:
            grad_k = _back_through_unit(grad_k, k, factor_k)
        _write(target + C, places_k, here_k, 3 * C, grad_k * factor, D, WIDTH)
