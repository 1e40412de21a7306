/* Antialiased bicubic and bilinear resizing of 8-bit RGB, equal to Pillow's to the last bit.

   As in Pillow, the weights of an output are computed in double precision, made to add up to 1 and rounded to whole
   multiples of 2^-22; rows are resized first, rounded to 8 bits, then columns. Only what the window needs is computed.
   Four rows are resized at once: with four bytes of four pixels beside each other, one vector holds what one weight
   is multiplied with. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "lanes.h"

#define BITS 22       /* of a weight behind the point: 32, less 8 of the pixel, less 2 for sums beyond 1 and the sign */
#define GROUP 4       /* rows that are resized at once */
#define LARGEST 65500 /* pixels of a side */

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

void axis_free(Axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weights);
    memset(axis, 0, sizeof *axis);
}

/* The weights of outputs `start` … `start + wanted - 1` of `inputs` → `outputs`. */
static int axis_make(Axis *axis, int inputs, int outputs, int start, int wanted, int bicubic) {
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
        axis_free(axis);
        return NOT_FOR_ME;
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

/* Columns low … high - 1 of four rows, as [column][row][R G B X]. */
static void interleave(const uint8_t *rows[GROUP], int pixel_bytes, int low, int high, uint8_t *out) {
    int last = pixel_bytes == 4 ? high : high - 1; /* four bytes are read where the fourth belongs to the next pixel */
    for (int x = low; x < last; x++, out += 4 * GROUP)
        for (int r = 0; r < GROUP; r++)
            memcpy(out + 4 * r, rows[r] + (long)x * pixel_bytes, 4);
    for (int x = last; x < high; x++, out += 4 * GROUP)
        for (int r = 0; r < GROUP; r++)
            memcpy(out + 4 * r, rows[r] + (long)x * 3, 3);
}

/* Four interleaved rows to four of the intermediate image. */
static void resize_rows(const Axis *axis, const uint8_t *columns, int flip, uint8_t *out, long stride) {
    for (int at = 0; at < axis->outputs; at++) {
        int i = flip ? axis->outputs - 1 - at : at;
        const uint8_t *pixels = columns + (long)(axis->first[i] - axis->low) * LANES;
        const int32_t *weights = axis->weights + (long)i * axis->taps;
        Sums sums = all(1 << (BITS - 1));
        for (int t = 0; t < axis->count[i]; t++)
            sums = add_weighted(sums, pixels + (long)t * LANES, weights[t]);
        uint8_t bytes[LANES];
        store_clipped(bytes, sums, BITS);
        for (int r = 0; r < GROUP; r++) /* the fourth byte is overwritten by the next pixel */
            memcpy(out + r * stride + 3 * at, bytes + 4 * r, 4);
    }
}

/* One row of the result out of the intermediate image's rows. Reads and writes in whole vectors; both have room. */
static void resize_column_part(const uint8_t *pixels, long stride, const int32_t *weights, int count, uint8_t *out) {
    Sums a = all(1 << (BITS - 1)), b = a, c = a, d = a;
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

/* Whether the job lies in the image, and is none of the very tall ones whose columns Pillow resizes before the rows. */
int job_is_sound(const Job *job, int image_width, int image_height) {
    int sides[] = {job->width, job->height, job->out_width, job->out_height, job->window_width, job->window_height};
    for (int i = 0; i < 6; i++)
        if (sides[i] < 1 || sides[i] > LARGEST)
            return 0;
    if (job->height > 100 * job->width)
        return 0;
    return job->left >= 0 && job->top >= 0 && job->width <= image_width - job->left &&
           job->height <= image_height - job->top && job->window_left >= 0 && job->window_top >= 0 &&
           job->window_width <= job->out_width - job->window_left &&
           job->window_height <= job->out_height - job->window_top;
}

/* The window of `job` into `out` (window height, window width, 3). `source` is the job's rectangle; of it only the
   columns and rows that `across` and `down` use are read. */
int resize_window(const Job *job, const Axis *across, const Axis *down, Pixels source, uint8_t *out) {
    int bytes = 3 * across->outputs, rows = down->high - down->low;
    long stride = bytes + 4 * LANES; /* room for reading and writing in whole vectors */
    uint8_t *columns = malloc((size_t)(across->high - across->low) * LANES);
    uint8_t *between = malloc((size_t)(rows + GROUP) * stride);
    if (!columns || !between) {
        free(columns);
        free(between);
        return NOT_FOR_ME;
    }
    for (int y = 0; y < rows; y += GROUP) {
        const uint8_t *group[GROUP];
        for (int r = 0; r < GROUP; r++) /* beyond the last row: the last again, into rows that nobody reads */
            group[r] = source.pixels + (down->low + (y + r < rows ? y + r : rows - 1)) * source.stride;
        interleave(group, source.pixel_bytes, across->low, across->high, columns);
        resize_rows(across, columns, job->flip, between + y * stride, stride);
    }
    resize_columns(down, between, stride, bytes, out);
    free(columns);
    free(between);
    return OK;
}

/* Both axes of a job. */
int axes_make(Axis *across, Axis *down, const Job *job) {
    if (axis_make(across, job->width, job->out_width, job->window_left, job->window_width, job->bicubic))
        return NOT_FOR_ME;
    if (axis_make(down, job->height, job->out_height, job->window_top, job->window_height, job->bicubic)) {
        axis_free(across);
        return NOT_FOR_ME;
    }
    return OK;
}

/* The same from an RGB image of `image_width` × `image_height` in memory, `stride` bytes from row to row. */
int swin_resize(const uint8_t *pixels, long stride, int image_width, int image_height, const Job *job, uint8_t *out) {
    Axis across, down;
    if (!job_is_sound(job, image_width, image_height) || axes_make(&across, &down, job))
        return NOT_FOR_ME;
    Pixels source = {pixels + job->top * stride + 3L * job->left, stride, 3};
    int result = resize_window(job, &across, &down, source, out);
    axis_free(&across);
    axis_free(&down);
    return result;
}
