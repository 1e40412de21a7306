/* What affine.c and warp.c share: one affine transform, and how its values are made certain. */
#ifndef SWIN_AFFINE_H
#define SWIN_AFFINE_H

#include "augment.h"

#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math") /* without which there are no vectors where floats are rounded */
#endif

typedef struct {
    const uint8_t *in;
    uint8_t *out;
    int h, w;
    int bicubic;     /* else bilinear */
    const double *a; /* of struct step */
    uint8_t fill[3];
} transform;

/* Single-precision values are cut off to 1/4096. Bounds of their error in that unit, with room: along one axis the sum is
   of differences up to 255 with weights up to 1, with six roundings of 2^-24: below 2e-4 or 0.9. In two dimensions there
   are 16 products of weights, which sum to less than 1.7 in magnitude and are themselves off by at most 1e-6, with up to
   255: below 6e-4 or 2.5. */
#define ONE 4096
#define DOUBT_1D 3
#define DOUBT_2D 5

static inline uint8_t cut_off(int value) {
    value >>= 12;
    value = value < 0 ? 0 : value;
    return (uint8_t)(value > 255 ? 255 : value);
}

static inline int near_whole(int value, int doubt) { return ((value + doubt) & (ONE - 1)) < 2 * doubt; }

static inline int clamp(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

static inline uint8_t *pixel_of(const transform *t, int x, int y) { return t->out + 3 * ((size_t)y * t->w + x); }

static inline void put_fill(const transform *t, int x, int y) { memcpy(pixel_of(t, x, y), t->fill, 3); }

/* Makes one pixel as Pillow does. */
void swin_exact_pixel(const transform *t, int x, int y);

/* Makes those values of row y again of whose 3 w bytes in `doubt` (and 8 more, all 0) one is set. */
void swin_settle(const transform *t, const uint8_t *doubt, int y);

/* Any matrix; 0, or -1 where there is no memory. */
int swin_warp(const transform *t);

#endif
