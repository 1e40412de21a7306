/* What the C files share. Pixels are 8 bit, R G B in that order; "RGBX" has a fourth byte that means nothing. */

#ifndef SWIN_IMAGE_H
#define SWIN_IMAGE_H

#include <stdint.h>

/* What every function answers. */
enum { OK = 0, NOT_FOR_ME = 1, ASK_PILLOW = 2 };

/* A rectangle of pixels in memory. */
typedef struct {
    const uint8_t *pixels; /* of the upper left corner */
    long stride;           /* bytes from one row to the next */
    int pixel_bytes;       /* 3: RGB, 4: RGBX */
} Pixels;

/* What is to be made of an image: `left`, `top`, `width`, `height` of it is resized to `out_width` × `out_height`, of
   which the window of `window_width` × `window_height` at (`window_left`, `window_top`) is wanted, mirrored if `flip`. */
typedef struct {
    int left, top, width, height;
    int out_width, out_height;
    int window_left, window_top, window_width, window_height;
    int bicubic; /* else bilinear */
    int flip;
} Job;

/* How one axis is resized: output i is the sum over t < count[i] of weights[i * taps + t] * input[first[i] + t]. */
typedef struct {
    int outputs, taps;
    int low, high; /* inputs low … high - 1 are used at all */
    int *first, *count;
    int32_t *weights;
} Axis;

int axes_make(Axis *across, Axis *down, const Job *job);
void axis_free(Axis *axis);
int job_is_sound(const Job *job, int image_width, int image_height);
int resize_window(const Job *job, const Axis *across, const Axis *down, Pixels source, uint8_t *out);

#endif
