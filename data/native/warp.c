/* Affine transforms in two dimensions: sixteen taps a pixel. See affine.c. */

#include "affine.h"

#include <math.h>

typedef float four __attribute__((vector_size(16)));    /* channels of a pixel; the last is empty */
typedef float sixteen __attribute__((vector_size(64))); /* four pixels side by side */

enum { PAD = 2 };

/* For each pixel of a row: where in `padded` its taps begin (-1: outside the picture) and its weights; room to work. */
typedef struct {
    int32_t *at, *places;
    float *x[4], *y[4], *d;
} taps;

/* The picture as four floats a pixel, with its border pixels repeated PAD times on every side. */
static void pad(const transform *t, float *padded) {
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

static void weights_of_row(const float *restrict d, float *restrict t0, float *restrict t1, float *restrict t2,
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

/* Of the places factor × (x + 1/2) + across + shift of a row, along one axis: the pixel that they lie in, the pixel
   before or at whose middle they lie, and how far behind that. */
static void places_of_row(double factor, double across, double shift, int w, int32_t *restrict pixel,
                          int32_t *restrict before, float *restrict d) {
    for (int x = 0; x < w; x++) {
        double source = factor * (x + 0.5) + across + shift, from = source - 0.5, whole = floor(from);
        pixel[x] = (int32_t)floor(source);
        before[x] = (int32_t)whole;
        d[x] = (float)(from - whole);
    }
}

static void taps_of_row(const transform *t, int y, const taps *p) {
    const double *a = t->a;
    int w = t->w, h = t->h, stride = w + 2 * PAD;
    int32_t *restrict at = p->at, *restrict ix = p->places, *restrict iy = ix + w, *restrict jx = iy + w,
            *restrict jy = jx + w;
    places_of_row(a[0], a[1] * (y + 0.5), a[2], w, ix, jx, p->d);
    weights_of_row(p->d, p->x[0], p->x[1], p->x[2], p->x[3], w, t->bicubic);
    places_of_row(a[3], a[4] * (y + 0.5), a[5], w, iy, jy, p->d);
    weights_of_row(p->d, p->y[0], p->y[1], p->y[2], p->y[3], w, t->bicubic);
    for (int x = 0; x < w; x++) {
        int inside = (ix[x] >= 0) & (ix[x] < w) & (iy[x] >= 0) & (iy[x] < h);
        at[x] = inside ? 4 * ((jy[x] - 1 + PAD) * stride + jx[x] - 1 + PAD) : -1;
    }
}

static inline void load(sixteen *v, const float *p) { memcpy(v, p, sizeof *v); }

/* The sixteen taps of each channel at `at`, weighted by y down and x across. */
static inline four of_taps(const float *at, size_t stride, const taps *p, int x) {
    sixteen rows[4];
    for (int j = 0; j < 4; j++)
        load(&rows[j], at + (size_t)j * stride);
    sixteen down = rows[0] * p->y[0][x] + rows[1] * p->y[1][x] + rows[2] * p->y[2][x] + rows[3] * p->y[3][x];
    four part[4];
    memcpy(part, &down, sizeof part);
    return part[0] * p->x[0][x] + part[1] * p->x[1][x] + part[2] * p->x[2][x] + part[3] * p->x[3][x];
}

/* Pixels of a row from what `of_taps` made of them. */
static void finish_row(const float *restrict values, uint8_t *restrict out, uint8_t *restrict doubt, int w) {
    for (int x = 0; x < w; x++)
        for (int c = 0; c < 3; c++) {
            int fixed = (int)(values[4 * x + c] * ONE);
            out[3 * x + c] = cut_off(fixed);
            doubt[3 * x + c] = (uint8_t)near_whole(fixed, DOUBT_2D);
        }
}

int swin_warp(const transform *t) {
    int w = t->w;
    size_t stride = 4 * (size_t)(w + 2 * PAD), area = stride * (size_t)(t->h + 2 * PAD); /* in floats, as all here */
    size_t line = ((size_t)w + 15) & ~(size_t)15;
    float *padded = swin_scratch(sizeof(float) * (area + 18 * line) + 3 * line);
    if (!padded)
        return -1;
    float *lines = padded + area, *values = lines + 14 * line;
    uint8_t *doubt = (uint8_t *)(lines + 18 * line);
    taps p = {.at = (int32_t *)(lines + 8 * line), .places = (int32_t *)(lines + 9 * line), .d = lines + 13 * line};
    for (int i = 0; i < 4; i++) {
        p.x[i] = lines + i * line;
        p.y[i] = lines + (4 + i) * line;
    }
    pad(t, padded);
    memset(doubt + 3 * w, 0, 8);
    for (int y = 0; y < t->h; y++) {
        taps_of_row(t, y, &p);
        for (int x = 0; x < w; x++) {
            four value = {0};
            if (p.at[x] >= 0)
                value = of_taps(padded + p.at[x], stride, &p, x);
            memcpy(values + 4 * x, &value, sizeof value);
        }
        finish_row(values, pixel_of(t, 0, y), doubt, w);
        for (int x = 0; x < w; x++)
            if (p.at[x] < 0) {
                put_fill(t, x, y);
                memset(doubt + 3 * x, 0, 3);
            }
        swin_settle(t, doubt, y);
    }
    return 0;
}
