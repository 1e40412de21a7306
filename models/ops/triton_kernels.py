"""The Triton kernels of window attention. `triton_attention.py` launches them; `reference.py` is the definition.

Nothing is copied to form windows. A program computes the positions of its window's tokens in the unsplit projection
(B, H, W, 3, nH, d) after the cyclic shift, and loads and stores them there.

A program handles one head and one block of `BLOCK` of the window's N queries (in `backward_keys`: keys). It keeps the
block's part of the position bias in registers, in the backward pass its gradient too, and loops over its split of the
windows of all images: every `gridDim.z`-th. The shift wraps only windows of the last row and the last column around,
so only these need a mask, and a program loops over them separately, after the others. In the backward pass all N tokens
of the other side are one tile of `N_PADDED`. If BLOCK = N_PADDED, both sides are a single tile, and a window is read
once. The backward pass needs only the inputs: it recomputes the probabilities. Gradients that are sums over windows are
stored once per program and summed afterwards, in a fixed order.

Scores are multiplied by log2(e), because exp2 is cheaper than exp.

Shapes: `B` batch, `H W` token grid, `rows`, `columns` of windows in an image, `C` channels, `M` side of a window, `N`
tokens in a window, `nH` heads, `d` (`D`) head dimension, `D_PADDED` rounded up to a power of 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MASK_VALUE = tl.constexpr(-100.0)  # as `models.ops.window.MASK_VALUE`
MIN_LENGTH = tl.constexpr(1e-12)  # as `models.ops.reference.MIN_LENGTH`
# Integers of which Triton must not compile a variant for 1 and for multiples of 16. C keeps them: loads need its 16.
VARYING = ("B", "rows", "columns", "shift_h", "shift_w")


@triton.constexpr_function
def _tile_width(remaining, largest):
    """Returns the width of the next tile when `remaining` tokens are left: a power of 2, as Triton requires."""
    return max(16, min(largest, triton.next_power_of_2(remaining)))


@triton.jit
def _dot(a, b):
    """Matrix product, accumulated in float32; float32 inputs as three TF32 products of their upper and lower bits."""
    if INTERPRETED:  # the interpreter has no bfloat16 product
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _windows_inside(rows, columns, shift_h, shift_w):
    """Returns the number of windows of an image that the shift does not wrap around."""
    return (rows - tl.minimum(shift_h, 1)) * (columns - tl.minimum(shift_w, 1))


@triton.jit
def _find_window(i, rows, columns, shift_h, shift_w, WRAPPED: tl.constexpr):
    """Returns the image, row and column of the i-th window of those that the shift wraps around, or of the others."""
    inside = _windows_inside(rows, columns, shift_h, shift_w)
    if WRAPPED:  # the last row, if that axis is shifted, then the rest of the last column
        in_last_row = columns * tl.minimum(shift_h, 1)
        image, j = i // (rows * columns - inside), i % (rows * columns - inside)
        row = tl.where(j < in_last_row, rows - 1, j - in_last_row)
        column = tl.where(j < in_last_row, j, columns - 1)
    else:
        inside_columns = columns - tl.minimum(shift_w, 1)
        image, j = i // inside, i % inside
        row, column = j // inside_columns, j % inside_columns
    return image, row, column


@triton.jit
def _locate(tokens, row, column, rows, columns, shift_h, shift_w, M: tl.constexpr, WRAPPED: tl.constexpr):
    """Returns the positions of a window's tokens in the map (y·W + x), and their regions.

    Only tokens of one region see each other: `models.ops.window.region_ids`. Without WRAPPED there is one region.
    """
    H, W = rows * M, columns * M
    y = row * M + shift_h + tokens // M
    x = column * M + shift_w + tokens % M
    region = tokens * 0
    if WRAPPED:
        y = tl.where(y >= H, y - H, y)
        x = tl.where(x >= W, x - W, x)
        region = tl.where(y < shift_h, 2, 0) + tl.where(x < shift_w, 1, 0)
    return y * W + x, region


@triton.jit
def _load_tokens(base_ptr, positions, inside, stride, D: tl.constexpr, D_PADDED: tl.constexpr):
    """(tokens, D_PADDED): D values of each token at `positions`, then zeros; zeros for tokens that are not inside."""
    channels = tl.arange(0, D_PADDED)
    mask = inside[:, None] if D_PADDED == D else inside[:, None] & (channels < D)[None, :]
    return tl.load(base_ptr + positions[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tokens(base_ptr, positions, inside, stride, values, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Stores (tokens, D_PADDED) where `_load_tokens` loads them."""
    channels = tl.arange(0, D_PADDED)
    mask = inside[:, None] if D_PADDED == D else inside[:, None] & (channels < D)[None, :]
    pointers = base_ptr + positions[:, None] * stride + channels[None, :]
    tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalize(x):
    """Returns vectors (tokens, D_PADDED) scaled to length 1, in their dtype, and their inverse lengths in float32.

    The inverse of 0 is 0: a vector of zeros, such as the key of padding, stays zero and gets no gradient.
    """
    x_fp32 = x.to(tl.float32)
    length = tl.sqrt(tl.sum(x_fp32 * x_fp32, 1))
    inverse_length = tl.where(length < MIN_LENGTH, 0.0, 1.0 / tl.maximum(length, MIN_LENGTH))
    return (x_fp32 * inverse_length[:, None]).to(x.dtype), inverse_length


@triton.jit
def _normalize_backward(grad_unit, unit, inverse_length):
    """Returns the gradient of x, given that of `unit` = x / |x|: the component along x has no effect."""
    unit = unit.to(tl.float32)
    return (grad_unit - unit * tl.sum(unit * grad_unit, 1)[:, None]) * inverse_length[:, None]


@triton.jit
def _load_bias(bias_ptr, head, query_ids, key_ids, N: tl.constexpr):
    """(queries, keys) of the bias, times log2(e); -inf for keys beyond N, 0 for queries beyond N."""
    mask = (query_ids < N)[:, None] & (key_ids < N)[None, :]
    pointers = bias_ptr + head * N * N + query_ids[:, None] * N + key_ids[None, :]
    tile = tl.load(pointers, mask=mask, other=0.0) * LOG2E
    return tl.where((key_ids < N)[None, :], tile, float("-inf"))


@triton.jit
def _scores(q, k, bias, scale, regions_q, regions_k, WRAPPED: tl.constexpr):
    """(queries, keys) of scores, times log2(e), which `scale` includes already."""
    scores = _dot(q, tl.trans(k)) * scale + bias
    if WRAPPED:
        scores += tl.where(regions_q[:, None] != regions_k[None, :], MASK_VALUE * LOG2E, 0.0)
    return scores


@triton.jit
def _forward_window(
    qkv_ptr, out_ptr, bias_tiles, scale, i, head, query_ids,  # as in `forward`; the i-th window of its loop
    rows, columns, shift_h, shift_w, C,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, N_PADDED: tl.constexpr,
    WRAPPED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    image, row, column = _find_window(i, rows, columns, shift_h, shift_w, WRAPPED)
    image = image.to(tl.int64) * rows * columns * M * M
    positions_q, regions_q = _locate(query_ids, row, column, rows, columns, shift_h, shift_w, M, WRAPPED)
    base_ptr = qkv_ptr + image * 3 * C + head * D
    q = _load_tokens(base_ptr, positions_q, query_ids < M * M, 3 * C, D, D_PADDED)
    if COSINE:
        q, _ = _normalize(q)
    row_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D_PADDED), tl.float32)
    for start in tl.static_range(0, M * M, BLOCK):
        key_ids, positions_k, regions_k = query_ids, positions_q, regions_q
        if BLOCK < N_PADDED:
            key_ids = start + tl.arange(0, _tile_width(M * M - start, BLOCK))
            positions_k, regions_k = _locate(key_ids, row, column, rows, columns, shift_h, shift_w, M, WRAPPED)
        k = _load_tokens(base_ptr + C, positions_k, key_ids < M * M, 3 * C, D, D_PADDED)
        v = _load_tokens(base_ptr + 2 * C, positions_k, key_ids < M * M, 3 * C, D, D_PADDED)
        if COSINE:
            k, _ = _normalize(k)
        scores = _scores(q, k, bias_tiles[start // BLOCK], scale * LOG2E, regions_q, regions_k, WRAPPED)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probs = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        acc = acc * rescale[:, None] + _dot(probs.to(v.dtype), v)
        row_max = new_max
    out = acc / row_sum[:, None]
    _store_tokens(out_ptr + image * C + head * D, positions_q, query_ids < M * M, C, out, D, D_PADDED)


@triton.jit(do_not_specialize=VARYING)
def forward(
    qkv_ptr, bias_ptr, scales_ptr, scale, out_ptr,  # (B, H, W, 3, nH, d), (nH, N, N), (nH,) if COSINE, to (B, H, W, C)
    B, rows, columns, shift_h, shift_w, C,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, N_PADDED: tl.constexpr,
    SHIFTED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """As in Flash Attention, keys and values are loaded tile by tile, and the sums are rescaled to the new maximum."""
    head = tl.program_id(0)
    query_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_tiles = ()  # type: tuple[tl.tensor, ...]
    for start in tl.static_range(0, M * M, BLOCK):
        key_ids = start + tl.arange(0, _tile_width(M * M - start, BLOCK))
        bias_tiles += (_load_bias(bias_ptr, head, query_ids, key_ids, M * M),)
    if COSINE:
        scale = tl.load(scales_ptr + head)
    split, splits = tl.program_id(2), tl.num_programs(2)
    inside = _windows_inside(rows, columns, shift_h, shift_w)
    for i in tl.range(split, B * inside, splits):
        _forward_window(
            qkv_ptr, out_ptr, bias_tiles, scale, i, head, query_ids, rows, columns, shift_h, shift_w, C,
            M, D, D_PADDED, BLOCK, N_PADDED, False, COSINE,
        )  # fmt: skip
    if SHIFTED:
        # From the last split on, because the first ones may have had a window more.
        for i in tl.range(splits - 1 - split, B * (rows * columns - inside), splits):
            _forward_window(
                qkv_ptr, out_ptr, bias_tiles, scale, i, head, query_ids, rows, columns, shift_h, shift_w, C,
                M, D, D_PADDED, BLOCK, N_PADDED, True, COSINE,
            )  # fmt: skip


@triton.jit
def _backward_queries_window(
    grad_out_ptr, qkv_ptr, grad_qkv_ptr, stats_ptr, bias_tile, scale, i, head, query_ids, key_ids,
    rows, columns, shift_h, shift_w, C,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, N_PADDED: tl.constexpr,
    WRAPPED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Returns this window's terms of the gradients of the bias and of the scale."""
    N: tl.constexpr = M * M
    image, row, column = _find_window(i, rows, columns, shift_h, shift_w, WRAPPED)
    window = (image * rows + row) * columns + column
    image = image.to(tl.int64) * rows * columns * N
    positions_q, regions_q = _locate(query_ids, row, column, rows, columns, shift_h, shift_w, M, WRAPPED)
    positions_k, regions_k = positions_q, regions_q
    if BLOCK < N_PADDED:
        positions_k, regions_k = _locate(key_ids, row, column, rows, columns, shift_h, shift_w, M, WRAPPED)
    base_ptr = qkv_ptr + image * 3 * C + head * D
    q = _load_tokens(base_ptr, positions_q, query_ids < N, 3 * C, D, D_PADDED)
    k = _load_tokens(base_ptr + C, positions_k, key_ids < N, 3 * C, D, D_PADDED)
    v = _load_tokens(base_ptr + 2 * C, positions_k, key_ids < N, 3 * C, D, D_PADDED)
    grad_out = _load_tokens(grad_out_ptr + image * C + head * D, positions_q, query_ids < N, C, D, D_PADDED)
    if COSINE:
        q, inverse_length_q = _normalize(q)
        k, inverse_length_k = _normalize(k)
    scores = _scores(q, k, bias_tile, scale * LOG2E, regions_q, regions_k, WRAPPED)
    row_max = tl.max(scores, 1)
    probs = tl.exp2(scores - row_max[:, None])
    row_sum = tl.sum(probs, 1)
    probs *= (1.0 / row_sum)[:, None]
    grad_probs = _dot(grad_out, tl.trans(v))
    mean_grad = tl.sum(probs * grad_probs, 1)
    grad_scores = probs * (grad_probs - mean_grad[:, None])
    grad_scores_lp = grad_scores.to(q.dtype)
    grad_q = _dot(grad_scores_lp, k)
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    if COSINE:
        grad_scale = tl.sum(grad_q * q.to(tl.float32), 1)
        grad_q = _normalize_backward(grad_q, q, inverse_length_q)
    grad_base_ptr = grad_qkv_ptr + image * 3 * C + head * D
    _store_tokens(grad_base_ptr, positions_q, query_ids < N, 3 * C, grad_q * scale, D, D_PADDED)
    if BLOCK == N_PADDED:
        grad_v = _dot(tl.trans(probs.to(v.dtype)), grad_out)
        _store_tokens(grad_base_ptr + 2 * C, positions_k, key_ids < N, 3 * C, grad_v, D, D_PADDED)
        grad_k = _dot(tl.trans(grad_scores_lp), q)
        if COSINE:
            grad_k = _normalize_backward(grad_k, k, inverse_length_k)
        _store_tokens(grad_base_ptr + C, positions_k, key_ids < N, 3 * C, grad_k * scale, D, D_PADDED)
    else:
        row_stats_ptr = stats_ptr + (window * tl.num_programs(0).to(tl.int64) + head) * 2 * N + query_ids
        tl.store(row_stats_ptr, row_max + tl.log2(row_sum), mask=query_ids < N)
        tl.store(row_stats_ptr + N, mean_grad, mask=query_ids < N)
    return grad_scores, grad_scale


@triton.jit(do_not_specialize=VARYING)
def backward_queries(
    grad_out_ptr, qkv_ptr, bias_ptr, scales_ptr, scale,  # (B, H, W, C), then as in `forward`
    grad_qkv_ptr, grad_bias_ptr, grad_scales_ptr,  # (B, H, W, 3, nH, d), (splits, nH, N, N), (splits, blocks, nH)
    stats_ptr,  # (windows, nH, 2, N) for `backward_keys`: log2 of the softmax's denominator; Σ prob · grad_prob
    B, rows, columns, shift_h, shift_w, C,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, N_PADDED: tl.constexpr,
    SHIFTED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, the bias and the scales; if a window is a single tile, of keys and values too."""
    head = tl.program_id(0)
    N: tl.constexpr = M * M
    key_ids = tl.arange(0, N_PADDED)
    query_ids = key_ids
    if BLOCK < N_PADDED:
        query_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_tile = _load_bias(bias_ptr, head, query_ids, key_ids, N)
    grad_bias = tl.zeros((BLOCK, N_PADDED), tl.float32)
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    if COSINE:
        scale = tl.load(scales_ptr + head)
    split, splits = tl.program_id(2), tl.num_programs(2)
    inside = _windows_inside(rows, columns, shift_h, shift_w)
    for i in tl.range(split, B * inside, splits):
        bias_term, scale_term = _backward_queries_window(
            grad_out_ptr, qkv_ptr, grad_qkv_ptr, stats_ptr, bias_tile, scale, i, head, query_ids, key_ids,
            rows, columns, shift_h, shift_w, C, M, D, D_PADDED, BLOCK, N_PADDED, False, COSINE,
        )  # fmt: skip
        grad_bias += bias_term
        grad_scale += scale_term
    if SHIFTED:
        for i in tl.range(splits - 1 - split, B * (rows * columns - inside), splits):
            bias_term, scale_term = _backward_queries_window(
                grad_out_ptr, qkv_ptr, grad_qkv_ptr, stats_ptr, bias_tile, scale, i, head, query_ids, key_ids,
                rows, columns, shift_h, shift_w, C, M, D, D_PADDED, BLOCK, N_PADDED, True, COSINE,
            )  # fmt: skip
            grad_bias += bias_term
            grad_scale += scale_term
    mask = (query_ids < N)[:, None] & (key_ids < N)[None, :]
    own_ptr = grad_bias_ptr + (split * tl.num_programs(0) + head) * N * N
    tl.store(own_ptr + query_ids[:, None] * N + key_ids[None, :], grad_bias, mask=mask)
    if COSINE:
        block = (split * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + head
        tl.store(grad_scales_ptr + block, tl.sum(grad_scale, 0))


@triton.jit
def _backward_keys_window(
    grad_out_ptr, qkv_ptr, grad_qkv_ptr, stats_ptr, bias_tile, scale, i, head, query_ids, key_ids,
    rows, columns, shift_h, shift_w, C,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, WRAPPED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = M * M
    image, row, column = _find_window(i, rows, columns, shift_h, shift_w, WRAPPED)
    window = (image * rows + row) * columns + column
    image = image.to(tl.int64) * rows * columns * N
    positions_q, regions_q = _locate(query_ids, row, column, rows, columns, shift_h, shift_w, M, WRAPPED)
    positions_k, regions_k = _locate(key_ids, row, column, rows, columns, shift_h, shift_w, M, WRAPPED)
    base_ptr = qkv_ptr + image * 3 * C + head * D
    q = _load_tokens(base_ptr, positions_q, query_ids < N, 3 * C, D, D_PADDED)
    k = _load_tokens(base_ptr + C, positions_k, key_ids < N, 3 * C, D, D_PADDED)
    v = _load_tokens(base_ptr + 2 * C, positions_k, key_ids < N, 3 * C, D, D_PADDED)
    grad_out = _load_tokens(grad_out_ptr + image * C + head * D, positions_q, query_ids < N, C, D, D_PADDED)
    if COSINE:
        q, _ = _normalize(q)
        k, inverse_length_k = _normalize(k)
    row_stats_ptr = stats_ptr + (window * tl.num_programs(0).to(tl.int64) + head) * 2 * N + query_ids
    log2_row_sum = tl.load(row_stats_ptr, mask=query_ids < N, other=0.0)
    mean_grad = tl.load(row_stats_ptr + N, mask=query_ids < N, other=0.0)
    scores = _scores(q, k, bias_tile, scale * LOG2E, regions_q, regions_k, WRAPPED)
    probs = tl.exp2(scores - log2_row_sum[:, None])
    grad_base_ptr = grad_qkv_ptr + image * 3 * C + head * D
    grad_v = _dot(tl.trans(probs.to(v.dtype)), grad_out)
    _store_tokens(grad_base_ptr + 2 * C, positions_k, key_ids < N, 3 * C, grad_v, D, D_PADDED)
    grad_scores = probs * (_dot(grad_out, tl.trans(v)) - mean_grad[:, None])
    grad_k = _dot(tl.trans(grad_scores.to(q.dtype)), q)
    if COSINE:
        grad_k = _normalize_backward(grad_k, k, inverse_length_k)
    _store_tokens(grad_base_ptr + C, positions_k, key_ids < N, 3 * C, grad_k * scale, D, D_PADDED)


@triton.jit(do_not_specialize=VARYING)
def backward_keys(
    grad_out_ptr, qkv_ptr, bias_ptr, scales_ptr, scale, grad_qkv_ptr, stats_ptr,  # as in `backward_queries`
    B, rows, columns, shift_h, shift_w, C,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, N_PADDED: tl.constexpr,
    SHIFTED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, from the statistics that `backward_queries` has stored."""
    head = tl.program_id(0)
    query_ids = tl.arange(0, N_PADDED)
    key_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_tile = _load_bias(bias_ptr, head, query_ids, key_ids, M * M)
    if COSINE:
        scale = tl.load(scales_ptr + head)
    split, splits = tl.program_id(2), tl.num_programs(2)
    inside = _windows_inside(rows, columns, shift_h, shift_w)
    for i in tl.range(split, B * inside, splits):
        _backward_keys_window(
            grad_out_ptr, qkv_ptr, grad_qkv_ptr, stats_ptr, bias_tile, scale, i, head, query_ids, key_ids,
            rows, columns, shift_h, shift_w, C, M, D, D_PADDED, False, COSINE,
        )  # fmt: skip
    if SHIFTED:
        for i in tl.range(splits - 1 - split, B * (rows * columns - inside), splits):
            _backward_keys_window(
                grad_out_ptr, qkv_ptr, grad_qkv_ptr, stats_ptr, bias_tile, scale, i, head, query_ids, key_ids,
                rows, columns, shift_h, shift_w, C, M, D, D_PADDED, True, COSINE,
            )  # fmt: skip
