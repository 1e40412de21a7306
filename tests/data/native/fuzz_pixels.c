/* Resizes, augments and normalises random images with hostile numbers, to be compiled with sanitizers:
   fuzz_pixels COUNT SEED. All buffers have exactly the size that the library may use. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "augment.h"
#include "image.h"
#include "inputs.h"

int swin_resize(const uint8_t *pixels, long stride, int image_width, int image_height, const CropResizeParams *params,
                uint8_t *out);
int swin_augment(uint8_t *image, uint8_t *other, int h, int w, const OpRecord *ops, int count);
void swin_normalise(const uint8_t *image, float *out, int h, int w, const float *table);

static struct {
    long resized, augmented, refused;
} total;

/* Numbers near the bounds, of any size, infinite and NaN. */
static double any_number(void) {
    static const double edges[] = {
        0,   1,      -1,   0.5,  -0.5, 1e-12, -1e-12, 1e-9,  0.3,  -0.3, 1 - 1e-12, 1e6,  -1e6, 32768,  65536,
        1e9, -1e9,   3e9,  1e18, -1e300, 224, -224,   0.25,  2,    15,   16,        NAN,  INFINITY, -INFINITY,
    };
    double value;
    switch (below(4)) {
    case 0: value = edges[below(sizeof edges / sizeof *edges)]; break;
    case 1: value = (below(65536) - 32768) / 327.68; break;
    case 2: value = (below(65536) - 32768) / 32768.0; break;
    default: {
        uint64_t bits = (uint64_t)random_bits() << 32 | random_bits();
        memcpy(&value, &bits, sizeof value);
    }
    }
    return below(4) ? value : value + below(256) / 1000.0;
}

static OpRecord any_op(void) {
    OpRecord op = {.code = below(3) ? AFFINE : below(AFFINE + 1), .filter = below(3)};
    for (int c = 0; c < 3; c++)
        op.fill[c] = below(256);
    if (op.code == AFFINE) {
        static const int along_an_axis[] = {1, 2, 3, 5};
        op.a[0] = op.a[4] = 1;
        int only = below(3);
        for (int k = 0; k < 6; k++)
            if (!only)
                op.a[k] = any_number();
        if (only)
            op.a[along_an_axis[below(4)]] = any_number();
    } else
        op.a[0] = below(2) ? any_number() : below(300) - 20;
    if (below(16) == 0)
        ((double *)&op)[below(11)] = any_number();
    return op;
}

static void augment(uint8_t *image, int h, int w) {
    uint8_t *other = malloc(3L * w * h);
    int count = below(4);
    OpRecord *ops = malloc(sizeof *ops * (count ? count : 1));
    for (int i = 0; i < count; i++)
        ops[i] = any_op();
    int result = swin_augment(image, other, h, w, ops, count);
    result < 0 ? total.refused++ : total.augmented++;
    float *table = calloc(768, sizeof *table), *out = malloc(3 * sizeof *out * w * h);
    swin_normalise(result == 1 ? other : image, out, h, w, table);
    free(table);
    free(out);
    free(ops);
    free(other);
}

static void resize(const uint8_t *image, int h, int w) {
    CropResizeParams p = {.width = 1 + below(w), .height = 1 + below(h), .bicubic = below(2), .flip = below(2)};
    p.left = below(w - p.width + 1);
    p.top = below(h - p.height + 1);
    p.out_width = 1 + below(below(2) ? 300 : 40);
    p.out_height = 1 + below(100);
    p.window_width = 1 + below(p.out_width);
    p.window_height = 1 + below(p.out_height);
    p.window_left = below(p.out_width - p.window_width + 1);
    p.window_top = below(p.out_height - p.window_height + 1);
    if (below(4) == 0)
        ((int *)&p)[below(12)] = (int)random_bits() >> below(32);
    long bytes = 3L * p.window_width * p.window_height;
    if (p.window_width < 1 || p.window_height < 1 || bytes > 10000000L)
        return;
    uint8_t *out = malloc(bytes);
    swin_resize(image, 3L * w, w, h, &p, out) == OK ? total.resized++ : total.refused++;
    free(out);
}

int main(int count, char **arguments) {
    long inputs = count > 2 ? atol(arguments[1]) : 0;
    for (long i = 0; i < inputs; i++) {
        seed_random(atol(arguments[2]) * 1000003L + i);
        int most = below(4) ? 20 : 90, w = 1 + below(most), h = 1 + below(most), kind = below(4);
        uint8_t *image = malloc(3L * w * h);
        for (long k = 0; k < 3L * w * h; k++)
            image[k] = kind == 0 ? 7 : kind == 1 ? ONE_OF(0, 255) : (int)random_bits();
        if (below(3) == 0)
            resize(image, h, w);
        else
            augment(image, h, w);
        free(image);
    }
    printf("%ld resized, %ld augmented, %ld refused\n", total.resized, total.augmented, total.refused);
    return 0;
}
