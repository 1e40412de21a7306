/* Affine transforms in two dimensions, with sixteen taps for each pixel. See affine.c. */

#include "affine.h"

#include <math.h>

typedef float four __attribute__((vector_size(16)));    /* the channels of a pixel; the last is unused */
typedef float sixteen __attribute__((vector_size(64))); /* four pixels side by side */

enum { PAD = 2 };

/* For each pixel of a row: `at`, the index in `padded` of its first tap (-1: outside the source), and the weights x and
   y of its taps. `positions` and `d` are scratch memory. */
typedef struct {
    int32_t *at, *positions;
    float *x[4], *y[4], *d;
} RowTaps;

/* Converts the image to four floats a pixel, with its border pixels repeated PAD times on every side. */
static void pad(const AffineOp *t, float *padded) {
    int w = t->w;
    size_t stride = 4 * (size_t)(w + 2 * PAD);
    for (int y = -PAD; y < t->h + PAD; y++) {
        const uint8_t *row = t->in + (size_t)clamp(y, t->h) * w * 3;
        float *to = padded + (size_t)(y + PAD) * stride + 4 * PAD;
        for (int x = 0; x < w; x++) {
            to[4 * x] = row[3 * x];
            to[4 * x + 1] = row[3 * x + 1];
            to[4 * x + 2] = row[3 * x + 2];
            to[4 * x + 3] = 0;
        }
        for (int x = 1; x <= PAD; x++) {
            memcpy(to - 4 * x, to, sizeof(four));
            memcpy(to + 4 * (w - 1 + x), to + 4 * (w - 1), sizeof(four));
        }
    }
}

static void row_weights(const float *restrict d, float *restrict t0, float *restrict t1, float *restrict t2,
                        float *restrict t3, int w, int bicubic) {
    if (bicubic)
        for (int x = 0; x < w; x++) {
            float f = d[x];
            t0[x] = f * (-1.0f + f * (2.0f - f));
            t1[x] = 1.0f + f * f * (f - 2.0f);
            t2[x] = f * (1.0f + f * (1.0f - f));
            t3[x] = f * f * (f - 1.0f);
        }
    else
        for (int x = 0; x < w; x++) {
            t0[x] = t3[x] = 0.0f;
            t1[x] = 1.0f - d[x];
            t2[x] = d[x];
        }
}

/* For the positions factor × (x + 1/2) + across + shift of a row, along an axis of `size` pixels: `pixel` contains the
   position, `before` is the last pixel whose centre is not after the position, and `d` is the distance from that centre.
   Positions outside the source, and NaN, become others outside that fit into 32 bits. */
static void source_positions(double factor, double across, double shift, int w, int size, int32_t *restrict pixel,
                             int32_t *restrict before, float *restrict d) {
    double lowest = -2.0, highest = size + 2.0;
    for (int x = 0; x < w; x++) {
        double source = factor * (x + 0.5) + across + shift;
        source = source > lowest ? source : lowest;
        source = source < highest ? source : highest;
        double from = source - 0.5, base = floor(from);
        pixel[x] = (int32_t)floor(source);
        before[x] = (int32_t)base;
        d[x] = (float)(from - base);
    }
}

static void row_taps(const AffineOp *t, int y, const RowTaps *p) {
    const double *a = t->a;
    int w = t->w, h = t->h, stride = w + 2 * PAD;
    int32_t *restrict at = p->at, *restrict ix = p->positions, *restrict iy = ix + w, *restrict jx = iy + w,
            *restrict jy = jx + w;
    source_positions(a[0], a[1] * (y + 0.5), a[2], w, w, ix, jx, p->d);
    row_weights(p->d, p->x[0], p->x[1], p->x[2], p->x[3], w, t->bicubic);
    source_positions(a[3], a[4] * (y + 0.5), a[5], w, h, iy, jy, p->d);
    row_weights(p->d, p->y[0], p->y[1], p->y[2], p->y[3], w, t->bicubic);
    for (int x = 0; x < w; x++) {
        int inside = (ix[x] >= 0) & (ix[x] < w) & (iy[x] >= 0) & (iy[x] < h);
        at[x] = inside ? 4 * ((jy[x] - 1 + PAD) * stride + jx[x] - 1 + PAD) : -1;
    }
}

static inline void load(sixteen *v, const float *p) { memcpy(v, p, sizeof *v); }

/* The weighted sum of the sixteen taps at `at`, for each channel. */
static inline four interpolate(const float *at, size_t stride, const RowTaps *p, int x) {
    sixteen rows[4];
    for (int j = 0; j < 4; j++)
        load(&rows[j], at + (size_t)j * stride);
    sixteen down = rows[0] * p->y[0][x] + rows[1] * p->y[1][x] + rows[2] * p->y[2][x] + rows[3] * p->y[3][x];
    four part[4];
    memcpy(part, &down, sizeof part);
    return part[0] * p->x[0][x] + part[1] * p->x[1][x] + part[2] * p->x[2][x] + part[3] * p->x[3][x];
}

/* Truncates the interpolated values of a row to bytes, and marks those near an integer. */
static void store_row(const float *restrict values, uint8_t *restrict out, uint8_t *restrict inexact, int w) {
    for (int x = 0; x < w; x++)
        for (int c = 0; c < 3; c++) {
            int fixed = (int)(values[4 * x + c] * FIXED_ONE);
            out[3 * x + c] = truncate_u8(fixed);
            inexact[3 * x + c] = (uint8_t)near_integer(fixed, ERROR_2D);
        }
}

int affine_2d(const AffineOp *t) {
    int w = t->w;
    /* All sizes are in floats. */
    size_t stride = 4 * (size_t)(w + 2 * PAD), area = stride * (size_t)(t->h + 2 * PAD);
    size_t line = ((size_t)w + 15) & ~(size_t)15;
    float *padded = scratch_buffer(sizeof(float) * (area + 18 * line) + 3 * line);
    if (!padded)
        return -1;
    float *lines = padded + area, *values = lines + 14 * line;
    uint8_t *inexact = (uint8_t *)(lines + 18 * line);
    RowTaps p = {
        .at = (int32_t *)(lines + 8 * line), .positions = (int32_t *)(lines + 9 * line), .d = lines + 13 * line,
    };
    for (int i = 0; i < 4; i++) {
        p.x[i] = lines + i * line;
        p.y[i] = lines + (4 + i) * line;
    }
    pad(t, padded);
    memset(inexact + 3 * w, 0, 8);
    for (int y = 0; y < t->h; y++) {
        row_taps(t, y, &p);
        for (int x = 0; x < w; x++) {
            four value = {0};
            if (p.at[x] >= 0)
                value = interpolate(padded + p.at[x], stride, &p, x);
            memcpy(values + 4 * x, &value, sizeof value);
        }
        store_row(values, pixel_of(t, 0, y), inexact, w);
        for (int x = 0; x < w; x++)
            if (p.at[x] < 0) {
                put_fill(t, x, y);
                memset(inexact + 3 * x, 0, 3);
            }
        recompute_inexact(t, inexact, y);
    }
    return 0;
}
