/* Shared by the files of the augmentation. Images are contiguous (height, width, 3) bytes. */
#ifndef SWIN_AUGMENT_H
#define SWIN_AUGMENT_H

#include <stddef.h>
#include <stdint.h>

/* One operation on one image. data/transforms/native_augment.py packs the same fields, in this order, as doubles. */
typedef struct {
    double code;    /* of enum operation */
    double filter;  /* AFFINE: of enum filter */
    double fill[3]; /* AFFINE: colour of pixels sampled outside the source */
    double a[6];    /* AFFINE: the matrix from output to source positions; otherwise a[0] is the argument */
} OpRecord;

enum operation {
    AUTO_CONTRAST,
    EQUALIZE,
    INVERT,
    POSTERIZE,    /* bits to keep */
    SOLARIZE,     /* threshold */
    SOLARIZE_ADD, /* added to values below 128 */
    COLOR,        /* factors of the next four: 1 changes nothing */
    CONTRAST,
    BRIGHTNESS,
    SHARPNESS,
    AFFINE,
};

enum filter { NEAREST, BILINEAR, BICUBIC };

/* Returns a buffer of at least `bytes` that belongs to the calling thread, or NULL when out of memory. It may be read
   and written up to 64 bytes past its end. It is kept for the next call and not freed when the thread ends, so threads
   should be few and long-lived. */
void *scratch_buffer(size_t bytes);

/* Writes the affine transform of `in` to `out`. Returns 0, or -1 when out of memory. */
int swin_affine(const uint8_t *in, uint8_t *out, int h, int w, const OpRecord *s);

#endif
