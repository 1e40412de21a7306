/* What the files of the augmentation share. Pictures are (height, width, 3) bytes without gaps. */
#ifndef SWIN_AUGMENT_H
#define SWIN_AUGMENT_H

#include <stddef.h>
#include <stdint.h>

/* One operation on one picture. data/transforms/native_augment.py writes these in the same order, as doubles. */
typedef struct {
    double code;    /* of enum operation */
    double filter;  /* AFFINE: of enum filter */
    double fill[3]; /* AFFINE: the colour of what comes from outside the picture */
    double a[6];    /* AFFINE: the matrix, from a place in the result to one in the source; elsewhere a[0] is the argument */
} step;

enum operation {
    AUTO_CONTRAST,
    EQUALIZE,
    INVERT,
    POSTERIZE,    /* bits to keep */
    SOLARIZE,     /* threshold */
    SOLARIZE_ADD, /* what is added below 128 */
    COLOR,        /* factors of the four: 1 changes nothing */
    CONTRAST,
    BRIGHTNESS,
    SHARPNESS,
    AFFINE,
};

enum filter { NEAREST, BILINEAR, BICUBIC };

/* A buffer of at least `bytes` of the calling thread's own, kept until it needs a larger one (not freed when it ends, so
   threads should be few and long-lived); NULL: no memory. It may be read and written up to 64 bytes past its end. */
void *swin_scratch(size_t bytes);

/* Writes to `out` the affine transform of `in`; 0, or -1 where there is no memory. */
int swin_affine(const uint8_t *in, uint8_t *out, int h, int w, const step *s);

#endif
