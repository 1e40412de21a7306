/* Antialiased bicubic and bilinear resizing of 8-bit RGB, bit-equal to Pillow's.

   As in Pillow, the weights of an output are computed in double precision, normalised to sum to 1 and rounded to
   multiples of 2^-22. Rows are resized first and rounded to 8 bits, then columns. Only the pixels that the window needs
   are computed. Four rows are resized at once: the bytes of one column's four pixels fill one vector, which is
   multiplied by one weight. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "simd.h"

#define BITS 22       /* fractional bits of a weight: 32, minus 8 for the pixel, minus 2 for overshoot and the sign */
#define GROUP 4       /* rows resized at once */

static double bicubic_at(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static double bilinear_at(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

void free_axis(Axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weights);
    memset(axis, 0, sizeof *axis);
}

/* Computes the weights of the `wanted` outputs from `start` on, when `inputs` values are resized to `outputs`. */
static int make_axis(Axis *axis, int inputs, int outputs, int start, int wanted, int bicubic) {
    double scale = (double)inputs / outputs;
    double stretch = scale < 1.0 ? 1.0 : scale;
    double support = (bicubic ? 2.0 : 1.0) * stretch;
    double per_input = 1.0 / stretch;
    memset(axis, 0, sizeof *axis);
    axis->outputs = wanted;
    axis->taps = (int)ceil(support) * 2 + 1;
    axis->low = inputs;
    axis->first = malloc(sizeof(int) * wanted);
    axis->count = malloc(sizeof(int) * wanted);
    axis->weights = malloc(sizeof(int32_t) * wanted * axis->taps);
    double *exact = malloc(sizeof(double) * axis->taps);
    if (!axis->first || !axis->count || !axis->weights || !exact) {
        free(exact);
        free_axis(axis);
        return UNSUPPORTED;
    }
    for (int i = 0; i < wanted; i++) {
        double center = (start + i + 0.5) * scale, sum = 0.0;
        int low = (int)(center - support + 0.5), high = (int)(center + support + 0.5);
        low = low < 0 ? 0 : low;
        high = high > inputs ? inputs : high;
        for (int t = 0; t < high - low; t++) {
            double at = (t + low - center + 0.5) * per_input;
            sum += exact[t] = bicubic ? bicubic_at(at) : bilinear_at(at);
        }
        int32_t *weights = axis->weights + (long)i * axis->taps;
        for (int t = 0; t < high - low; t++) {
            double weight = (sum != 0.0 ? exact[t] / sum : exact[t]) * (1 << BITS);
            weights[t] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        axis->first[i] = low;
        axis->count[i] = high - low;
        axis->low = low < axis->low ? low : axis->low;
        axis->high = high > axis->high ? high : axis->high;
    }
    free(exact);
    return OK;
}

/* Interleaves columns low … high - 1 of four rows to [column][row][R G B X]. */
static void interleave(const uint8_t *rows[GROUP], int pixel_bytes, int low, int high, uint8_t *out) {
    int last = pixel_bytes == 4 ? high : high - 1; /* reads four bytes, one of the next pixel */
    for (int x = low; x < last; x++, out += 4 * GROUP)
        for (int r = 0; r < GROUP; r++)
            memcpy(out + 4 * r, rows[r] + (long)x * pixel_bytes, 4);
    for (int x = last; x < high; x++, out += 4 * GROUP)
        for (int r = 0; r < GROUP; r++)
            memcpy(out + 4 * r, rows[r] + (long)x * 3, 3);
}

/* Resizes four interleaved rows to four rows of the intermediate image. */
static void resize_rows(const Axis *axis, const uint8_t *columns, int flip, uint8_t *out, long stride) {
    for (int x = 0; x < axis->outputs; x++) {
        int i = flip ? axis->outputs - 1 - x : x;
        const uint8_t *pixels = columns + (long)(axis->first[i] - axis->low) * LANES;
        const int32_t *weights = axis->weights + (long)i * axis->taps;
        Sums16 sums = broadcast(1 << (BITS - 1));
        for (int t = 0; t < axis->count[i]; t++)
            sums = add_weighted(sums, pixels + (long)t * LANES, weights[t]);
        uint8_t bytes[LANES];
        store_clipped(bytes, sums, BITS);
        for (int r = 0; r < GROUP; r++) /* the fourth byte is overwritten by the next pixel */
            memcpy(out + r * stride + 3 * x, bytes + 4 * r, 4);
    }
}

/* Computes 4 * LANES bytes of an output row from the intermediate rows. Both must have room for that many. */
static void resize_column_part(const uint8_t *pixels, long stride, const int32_t *weights, int count, uint8_t *out) {
    Sums16 a = broadcast(1 << (BITS - 1)), b = a, c = a, d = a;
    for (int t = 0; t < count; t++, pixels += stride) {
        a = add_weighted(a, pixels, weights[t]);
        b = add_weighted(b, pixels + LANES, weights[t]);
        c = add_weighted(c, pixels + 2 * LANES, weights[t]);
        d = add_weighted(d, pixels + 3 * LANES, weights[t]);
    }
    store_clipped(out, a, BITS);
    store_clipped(out + LANES, b, BITS);
    store_clipped(out + 2 * LANES, c, BITS);
    store_clipped(out + 3 * LANES, d, BITS);
}

static void resize_columns(const Axis *axis, const uint8_t *rows, long stride, int bytes, uint8_t *out) {
    for (int i = 0; i < axis->outputs; i++) {
        const uint8_t *from = rows + (long)(axis->first[i] - axis->low) * stride;
        const int32_t *weights = axis->weights + (long)i * axis->taps;
        uint8_t *to = out + (long)i * bytes;
        int x = 0;
        for (; x + 4 * LANES <= bytes; x += 4 * LANES)
            resize_column_part(from + x, stride, weights, axis->count[i], to + x);
        if (x < bytes) {
            uint8_t rest[4 * LANES];
            resize_column_part(from + x, stride, weights, axis->count[i], rest);
            memcpy(to + x, rest, bytes - x);
        }
    }
}

/* Whether crop and window are inside the image and the output, and the crop is not so tall that Pillow resizes its
   columns before its rows. */
int valid_params(const CropResizeParams *params, int image_width, int image_height) {
    int sides[] = {
        params->width, params->height, params->out_width,
        params->out_height, params->window_width, params->window_height,
    };
    for (int i = 0; i < 6; i++)
        if (sides[i] < 1 || sides[i] > MAX_SIDE)
            return 0;
    if (params->height > 100 * params->width)
        return 0;
    return params->left >= 0 && params->top >= 0 && params->width <= image_width - params->left &&
           params->height <= image_height - params->top && params->window_left >= 0 && params->window_top >= 0 &&
           params->window_width <= params->out_width - params->window_left &&
           params->window_height <= params->out_height - params->window_top;
}

/* Writes the window to `out`, (window height, window width, 3). `source` is the crop; only the columns and rows that
   `across` and `down` use are read. */
int resize_window(const CropResizeParams *params, const Axis *across, const Axis *down, Pixels source, uint8_t *out) {
    int bytes = 3 * across->outputs, rows = down->high - down->low;
    long stride = bytes + 4 * LANES; /* with room for whole vectors at the end */
    uint8_t *columns = malloc((size_t)(across->high - across->low) * LANES);
    uint8_t *intermediate = malloc((size_t)(rows + GROUP) * stride);
    if (!columns || !intermediate) {
        free(columns);
        free(intermediate);
        return UNSUPPORTED;
    }
    for (int y = 0; y < rows; y += GROUP) {
        const uint8_t *group[GROUP];
        for (int r = 0; r < GROUP; r++) /* past the end the last row is repeated; that output is not used */
            group[r] = source.pixels + (down->low + (y + r < rows ? y + r : rows - 1)) * source.stride;
        interleave(group, source.pixel_bytes, across->low, across->high, columns);
        resize_rows(across, columns, params->flip, intermediate + y * stride, stride);
    }
    resize_columns(down, intermediate, stride, bytes, out);
    free(columns);
    free(intermediate);
    return OK;
}

/* Computes the weights of both axes. */
int make_axes(Axis *across, Axis *down, const CropResizeParams *params) {
    const CropResizeParams *p = params;
    if (make_axis(across, p->width, p->out_width, p->window_left, p->window_width, p->bicubic))
        return UNSUPPORTED;
    if (make_axis(down, p->height, p->out_height, p->window_top, p->window_height, p->bicubic)) {
        free_axis(across);
        return UNSUPPORTED;
    }
    return OK;
}

/* Crops and resizes an RGB image of `image_width` × `image_height` in memory, with `stride` bytes from row to row, into
   `out`, (window height, window width, 3). */
int swin_resize(const uint8_t *pixels, long stride, int image_width, int image_height, const CropResizeParams *params,
                uint8_t *out) {
    Axis across, down;
    if (!valid_params(params, image_width, image_height) || make_axes(&across, &down, params))
        return UNSUPPORTED;
    Pixels source = {pixels + params->top * stride + 3L * params->left, stride, 3};
    int result = resize_window(params, &across, &down, source, out);
    free_axis(&across);
    free_axis(&down);
    return result;
}
