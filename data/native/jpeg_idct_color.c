/* From coefficients to pixels: inverse DCT, chroma upsampling and conversion to RGB, with the integer arithmetic of
   libjpeg's accurate ("islow") method, and bit-equal to it. The DCT uses vector types: it computes the eight columns of
   a block at once, then its eight rows. */

#include <string.h>

#include "jpeg.h"

typedef int32_t Eight __attribute__((vector_size(32)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Eight){__VA_ARGS__})
#endif

static inline void transpose(Eight v[8]) {
    Eight t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = PICK(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[2 * i + 1] = PICK(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i++) {
        int a = (i & 4) | (i & 1); /* 0 1 0 1 4 5 4 5 */
        u[i] = i & 2 ? PICK(t[a], t[a + 2], 2, 3, 10, 11, 6, 7, 14, 15)
                     : PICK(t[a], t[a + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = PICK(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = PICK(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* One-dimensional inverse DCT of eight columns: the algorithm of Loeffler, Ligtenberg and Moschytz, with 11
   multiplications arranged as in libjpeg. Constants are scaled by 2^13; results are divided by 2^shift and rounded. */
static inline void dct_1d(Eight v[8], int shift) {
    Eight shared = (v[2] + v[6]) * 4433;
    Eight even2 = shared - v[6] * 15137, even3 = shared + v[2] * 6270;
    Eight even0 = (v[0] + v[4]) << 13, even1 = (v[0] - v[4]) << 13;
    Eight half = (Eight){0} + (1 << (shift - 1));
    Eight a0 = even0 + even3 + half, a3 = even0 - even3 + half, a1 = even1 + even2 + half, a2 = even1 - even2 + half;

    Eight z1 = (v[7] + v[1]) * -7373, z2 = (v[5] + v[3]) * -20995, z3 = v[7] + v[3], z4 = v[5] + v[1];
    Eight z5 = (z3 + z4) * 9633;
    z3 = z3 * -16069 + z5;
    z4 = z4 * -3196 + z5;
    Eight b3 = v[7] * 2446 + z1 + z3, b2 = v[5] * 16819 + z2 + z4;
    Eight b1 = v[3] * 25172 + z2 + z3, b0 = v[1] * 12299 + z1 + z4;

    v[0] = (a0 + b0) >> shift;
    v[7] = (a0 - b0) >> shift;
    v[1] = (a1 + b1) >> shift;
    v[6] = (a1 - b1) >> shift;
    v[2] = (a2 + b2) >> shift;
    v[5] = (a2 - b2) >> shift;
    v[3] = (a3 + b3) >> shift;
    v[4] = (a3 - b3) >> shift;
}

/* Converts a block's dequantised coefficients to 8 × 8 samples. Coefficients after `last` in zigzag order are 0. */
void inverse_dct(int32_t *coefficients, int last, uint8_t *out, long stride) {
    if (last == 0) {
        int value = ((coefficients[0] + 4) >> 3) + 128;
        value = value < 0 ? 0 : value > 255 ? 255 : value;
        for (int y = 0; y < 8; y++)
            memset(out + y * stride, value, 8);
        return;
    }
    Eight v[8];
    memcpy(v, coefficients, sizeof v);
    dct_1d(v, 11);
    transpose(v);
    dct_1d(v, 18);
    transpose(v);
    for (int y = 0; y < 8; y++) {
        Eight row = v[y] + 128;
        row &= ~(row < 0);
        row |= row > 255;
        for (int x = 0; x < 8; x++)
            out[y * stride + x] = (uint8_t)row[x];
    }
}

/* Upsamples one row of chroma: columns 2 from … 2 to - 1 of the output, from samples from … to - 1 of row `near` and,
   if chroma is halved vertically, of row `far`. Pointers are to sample 0. An output is 3/4 of the nearer sample and
   1/4 of the next one; a neighbour that does not exist or was not decoded is replaced by the sample itself. */
void upsample(const uint8_t *near, const uint8_t *far, int from, int to, int16_t *sums, uint8_t *out) {
    int16_t *s = sums + 8 - from; /* s[i] belongs to sample i */
    for (int i = from; i < to; i++)
        s[i] = far ? 3 * near[i] + far[i] : near[i];
    s[from - 1] = s[from];
    s[to] = s[to - 1];
    int first = far ? 8 : 1, second = far ? 7 : 2, shift = far ? 4 : 2;
    out -= 2 * from;
    for (int i = from; i < to; i++) {
        out[2 * i] = (3 * s[i] + s[i - 1] + first) >> shift;
        out[2 * i + 1] = (3 * s[i] + s[i + 1] + second) >> shift;
    }
}

void ycc_to_rgb(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int count, uint32_t *out) {
    for (int i = 0; i < count; i++) {
        int b = cb[i] - 128, r = cr[i] - 128;
        int red = y[i] + ((91881 * r + 32768) >> 16);
        int green = y[i] + ((-22554 * b - 46802 * r + 32768) >> 16);
        int blue = y[i] + ((116130 * b + 32768) >> 16);
        red = red < 0 ? 0 : red > 255 ? 255 : red;
        green = green < 0 ? 0 : green > 255 ? 255 : green;
        blue = blue < 0 ? 0 : blue > 255 ? 255 : blue;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        out[i] = (uint32_t)red | (uint32_t)green << 8 | (uint32_t)blue << 16;
#else
        out[i] = (uint32_t)red << 24 | (uint32_t)green << 16 | (uint32_t)blue << 8;
#endif
    }
}

void grey_to_rgb(const uint8_t *y, int count, uint32_t *out) {
    for (int i = 0; i < count; i++)
        out[i] = y[i] * 0x01010101u;
}
