/* Shared by affine.c and affine_2d.c: the transform, and the error bound of single-precision values. */
#ifndef SWIN_AFFINE_H
#define SWIN_AFFINE_H

#include "augment.h"

#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math") /* GCC does not vectorise float-to-int conversion otherwise */
#endif

typedef struct {
    const uint8_t *in;
    uint8_t *out;
    int h, w;
    int bicubic;     /* else bilinear */
    const double *a; /* OpRecord.a */
    uint8_t fill[3];
} AffineOp;

/* Single-precision values are truncated to fixed point with 12 fractional bits. ERROR_1D and ERROR_2D bound their error
   in units of 1/4096, with a margin:
   - Along one axis, differences up to 255 are summed with weights up to 1, with six roundings of 2^-24: the error is
     below 2e-4, or 0.9 units.
   - In two dimensions, values up to 255 are summed with 16 products of weights. The products sum to less than 1.7 in
     magnitude and are each off by at most 1e-6: the error is below 6e-4, or 2.5 units. */
#define FIXED_ONE 4096
#define ERROR_1D 3
#define ERROR_2D 5

static inline uint8_t truncate_u8(int value) {
    value >>= 12;
    value = value < 0 ? 0 : value;
    return (uint8_t)(value > 255 ? 255 : value);
}

/* Whether a fixed-point value is so near to an integer that truncation could go either way. */
static inline int near_integer(int value, int error) { return ((value + error) & (FIXED_ONE - 1)) < 2 * error; }

static inline int clamp(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

static inline uint8_t *pixel_of(const AffineOp *t, int x, int y) { return t->out + 3 * ((size_t)y * t->w + x); }

static inline void put_fill(const AffineOp *t, int x, int y) { memcpy(pixel_of(t, x, y), t->fill, 3); }

/* Computes one pixel in double precision, as Pillow does. */
void exact_pixel(const AffineOp *t, int x, int y);

/* Recomputes the values of row y whose byte in `inexact` is set. `inexact` has 3 w bytes, then 8 bytes of 0. */
void recompute_inexact(const AffineOp *t, const uint8_t *inexact, int y);

/* Transforms with any matrix. Returns 0, or -1 when out of memory. */
int affine_2d(const AffineOp *t);

#endif
