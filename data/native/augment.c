/* RandAugment's operations, bit-equal to Pillow. The affine operations are in affine.c.

   Pillow blends in single precision and truncates; its histogram operations use integers. The loops are written so that
   compilers vectorise them. */

#include "augment.h"

#include <stdlib.h>
#include <string.h>

#define MARGIN 64

void *scratch_buffer(size_t bytes) {
    static _Thread_local void *buffer;
    static _Thread_local size_t size;
    if (bytes + MARGIN > size) {
        free(buffer);
        buffer = malloc(bytes + MARGIN);
        size = buffer ? bytes + MARGIN : 0;
    }
    return buffer;
}

/* Truncates, then clips to 0 … 255. Integers are compared, because compilers vectorise that without further flags. */
static inline uint8_t clip_u8(float value) {
    int integer = (int)value;
    integer = integer < 0 ? 0 : integer;
    return (uint8_t)(integer > 255 ? 255 : integer);
}

/* Interpolates from `from` to `to` by `alpha`, as Pillow's blend does. */
static inline uint8_t blend(int from, int to, float alpha) {
    return clip_u8((float)from + alpha * (float)(to - from));
}

static inline int luminance(const uint8_t *pixel) {
    return (19595 * pixel[0] + 38470 * pixel[1] + 7471 * pixel[2] + 32768) >> 16;
}

/* ------------------------------------------------------------------------------------------- histograms and tables */

static void look_up(uint8_t *p, size_t pixels, uint8_t table[3][256]) {
    for (size_t i = 0; i < pixels; i++, p += 3) {
        p[0] = table[0][p[0]];
        p[1] = table[1][p[1]];
        p[2] = table[2][p[2]];
    }
}

static void identity(uint8_t table[256]) {
    for (int i = 0; i < 256; i++)
        table[i] = (uint8_t)i;
}

static void extremes(const uint8_t *p, size_t pixels, int lowest[3], int highest[3]) {
    enum { BLOCK = 64 }; /* pixels; with this length each vector lane always sees the same channel */
    uint8_t low[3 * BLOCK], high[3 * BLOCK];
    memset(low, 255, sizeof low);
    memset(high, 0, sizeof high);
    size_t blocks = pixels / BLOCK;
    for (size_t b = 0; b < blocks; b++, p += 3 * BLOCK)
        for (int k = 0; k < 3 * BLOCK; k++) {
            low[k] = p[k] < low[k] ? p[k] : low[k];
            high[k] = p[k] > high[k] ? p[k] : high[k];
        }
    for (size_t k = 0; k < 3 * (pixels - blocks * BLOCK); k++) {
        low[k] = p[k] < low[k] ? p[k] : low[k];
        high[k] = p[k] > high[k] ? p[k] : high[k];
    }
    for (int c = 0; c < 3; c++) {
        lowest[c] = 255;
        highest[c] = 0;
        for (int k = c; k < 3 * BLOCK; k += 3) {
            lowest[c] = low[k] < lowest[c] ? low[k] : lowest[c];
            highest[c] = high[k] > highest[c] ? high[k] : highest[c];
        }
    }
}

static void auto_contrast(uint8_t *p, size_t pixels) {
    uint8_t table[3][256];
    int lowest[3], highest[3];
    extremes(p, pixels, lowest, highest);
    for (int c = 0; c < 3; c++) {
        if (highest[c] <= lowest[c]) {
            identity(table[c]);
            continue;
        }
        double scale = 255.0 / (highest[c] - lowest[c]);
        double offset = -lowest[c] * scale;
        for (int i = 0; i < 256; i++) {
            double value = i * scale + offset;
            table[c][i] = value < 0.0 ? 0 : value > 255.0 ? 255 : (uint8_t)(int)value;
        }
    }
    look_up(p, pixels, table);
}

static void equalize(uint8_t *p, size_t pixels) {
    /* Two histograms, used alternately: neighbours often have the same value, and one counter would stall on itself. */
    uint32_t even[3][256] = {0}, odd[3][256] = {0};
    uint8_t table[3][256];
    const uint8_t *q = p;
    for (size_t i = 0; i + 1 < pixels; i += 2, q += 6) {
        even[0][q[0]]++;
        even[1][q[1]]++;
        even[2][q[2]]++;
        odd[0][q[3]]++;
        odd[1][q[4]]++;
        odd[2][q[5]]++;
    }
    for (int c = 0; c < 3; c++) {
        uint32_t *count = even[c];
        if (pixels & 1)
            count[q[c]]++;
        int last = 0;
        for (int i = 0; i < 256; i++) {
            count[i] += odd[c][i];
            last = count[i] ? i : last;
        }
        uint32_t width = (uint32_t)(pixels - count[last]) / 255, sum = width / 2;
        if (!width) {
            identity(table[c]);
            continue;
        }
        for (int i = 0; i < 256; i++) {
            uint32_t value = sum / width;
            table[c][i] = value > 255 ? 255 : (uint8_t)value;
            sum += count[i];
        }
    }
    look_up(p, pixels, table);
}

/* ------------------------------------------------------------------------------------------------ single values */

static void invert(uint8_t *p, size_t n) {
    for (size_t k = 0; k < n; k++)
        p[k] = 255 - p[k];
}

static void posterize(uint8_t *p, size_t n, int bits) {
    bits = bits < 0 ? 0 : bits > 8 ? 8 : bits;
    uint8_t mask = (uint8_t)(0xFF00 >> bits);
    for (size_t k = 0; k < n; k++)
        p[k] &= mask;
}

static void solarize(uint8_t *p, size_t n, int threshold) {
    if (threshold > 255)
        return;
    uint8_t from = (uint8_t)(threshold < 0 ? 0 : threshold);
    for (size_t k = 0; k < n; k++)
        p[k] = p[k] < from ? p[k] : 255 - p[k];
}

static void solarize_add(uint8_t *p, size_t n, int add) {
    for (size_t k = 0; k < n; k++) {
        int sum = p[k] + add;
        uint8_t raised = sum > 255 ? 255 : (uint8_t)sum;
        p[k] = p[k] < 128 ? raised : p[k];
    }
}

/* ------------------------------------------------------------------------------------------------ enhancement */

static void blend_with_value(uint8_t *p, size_t n, int value, float alpha) {
    for (size_t k = 0; k < n; k++)
        p[k] = blend(value, p[k], alpha);
}

static void contrast(uint8_t *p, size_t pixels, float alpha) {
    uint64_t sum = 0;
    for (size_t start = 0; start < pixels; start += 1 << 20) {
        size_t end = start + (1 << 20) < pixels ? start + (1 << 20) : pixels;
        uint32_t part = 0;
        for (size_t i = start; i < end; i++)
            part += (uint32_t)luminance(p + 3 * i);
        sum += part;
    }
    blend_with_value(p, 3 * pixels, (int)((double)sum / (double)pixels + 0.5), alpha);
}

static void color(uint8_t *p, size_t pixels, float alpha) {
    for (size_t i = 0; i < pixels; i++) {
        int grey = luminance(p + 3 * i);
        p[3 * i] = blend(grey, p[3 * i], alpha);
        p[3 * i + 1] = blend(grey, p[3 * i + 1], alpha);
        p[3 * i + 2] = blend(grey, p[3 * i + 2], alpha);
    }
}

/* The smoothed image is (sum of the eight neighbours + 5 × the pixel) / 13, rounded; border pixels stay unchanged.
   Pillow sums in floats. The exact quotient is never nearer than 1/26 to a rounding boundary, so integers give the same
   result. (s + 6) / 13 equals ((s + 6) × 5042) >> 16 for s up to 13 × 255. */
static void sharpness_row(const uint8_t *restrict above, const uint8_t *restrict row, const uint8_t *restrict below,
                          uint8_t *restrict out, uint16_t *restrict column, int n, float alpha) {
    for (int k = 0; k < n; k++)
        column[k] = (uint16_t)(above[k] + row[k] + below[k]);
    for (int k = 3; k < n - 3; k++) {
        uint16_t sum = (uint16_t)(column[k - 3] + column[k] + column[k + 3] + 4 * row[k] + 6);
        int smooth = (uint16_t)(((uint32_t)sum * 5042) >> 16);
        out[k] = blend(smooth, row[k], alpha);
    }
    for (int c = 0; c < 3; c++) {
        out[c] = row[c];
        out[n - 3 + c] = row[n - 3 + c];
    }
}

static int sharpness(const uint8_t *in, uint8_t *out, int h, int w, float alpha) {
    int n = 3 * w;
    uint16_t *column = scratch_buffer(sizeof(uint16_t) * (size_t)n);
    if (!column)
        return -1;
    memcpy(out, in, (size_t)n);
    memcpy(out + (size_t)(h - 1) * n, in + (size_t)(h - 1) * n, (size_t)n);
    for (int y = 1; y < h - 1; y++) {
        const uint8_t *row = in + (size_t)y * n;
        if (w < 3)
            memcpy(out + (size_t)y * n, row, (size_t)n);
        else
            sharpness_row(row - n, row, row + n, out + (size_t)y * n, column, n, alpha);
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------- exported functions */

static int in_range(double value, double lowest, double highest) {
    return value >= lowest && value <= highest; /* not for NaN */
}

/* Whether all numbers of a record fit into the types that they are converted to. A matrix may have any. */
static int valid_op(const OpRecord *s) {
    int valid = in_range(s->code, 0, AFFINE) && in_range(s->filter, 0, BICUBIC);
    for (int c = 0; c < 3; c++)
        valid &= in_range(s->fill[c], 0, 255);
    return valid && (s->code == AFFINE || in_range(s->a[0], -1e6, 1e6)); /* times 255 it still fits into an int */
}

/* Applies `ops` to `image` in order. Some operations work in place, others write to the second buffer. Returns 0 if the
   result is in `image`, 1 if it is in `other`. Otherwise the image is undefined: -1 when out of memory, -2 if an
   operation is not valid. */
int swin_augment(uint8_t *image, uint8_t *other, int h, int w, const OpRecord *ops, int count) {
    size_t pixels = (size_t)h * w, n = 3 * pixels;
    uint8_t *p = image, *spare = other;
    for (const OpRecord *s = ops; s < ops + count; s++) {
        int into_spare = 0, failed = 0;
        if (!valid_op(s))
            return -2;
        switch ((int)s->code) {
        case AUTO_CONTRAST: auto_contrast(p, pixels); break;
        case EQUALIZE: equalize(p, pixels); break;
        case INVERT: invert(p, n); break;
        case POSTERIZE: posterize(p, n, (int)s->a[0]); break;
        case SOLARIZE: solarize(p, n, (int)s->a[0]); break;
        case SOLARIZE_ADD: solarize_add(p, n, (int)s->a[0]); break;
        case COLOR: color(p, pixels, (float)s->a[0]); break;
        case CONTRAST: contrast(p, pixels, (float)s->a[0]); break;
        case BRIGHTNESS: blend_with_value(p, n, 0, (float)s->a[0]); break;
        case SHARPNESS: failed = sharpness(p, spare, h, w, (float)s->a[0]); into_spare = 1; break;
        case AFFINE: failed = swin_affine(p, spare, h, w, s); into_spare = 1; break;
        default: failed = -1;
        }
        if (failed)
            return -1;
        if (into_spare) {
            uint8_t *swap = p;
            p = spare;
            spare = swap;
        }
    }
    return p == other;
}

/* Converts (h, w, 3) bytes to (3, h, w) floats; value v of channel c becomes table[256 c + v]. */
void swin_normalise(const uint8_t *image, float *out, int h, int w, const float *table) {
    size_t pixels = (size_t)h * w;
    float *red = out, *green = out + pixels, *blue = out + 2 * pixels;
    for (size_t i = 0; i < pixels; i++) {
        red[i] = table[image[3 * i]];
        green[i] = table[256 + image[3 * i + 1]];
        blue[i] = table[512 + image[3 * i + 2]];
    }
}
