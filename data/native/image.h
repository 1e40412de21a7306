/* Shared by the C files of decoding and resizing. Pixels are 8-bit RGB; RGBX has a fourth, unused byte. */

#ifndef SWIN_IMAGE_H
#define SWIN_IMAGE_H

#include <stdint.h>

/* Status returned by the functions. UNSUPPORTED: Pillow has to decode the image, or to refuse it. CHECK_WITH_PILLOW:
   the image can be decoded here, provided that Pillow opens it. */
enum { OK = 0, UNSUPPORTED = 1, CHECK_WITH_PILLOW = 2 };

#define MAX_SIDE 65500 /* pixels of a side, as in libjpeg (JPEG_MAX_DIMENSION), which refuses larger JPEGs */

/* A rectangle of pixels in memory. */
typedef struct {
    const uint8_t *pixels; /* of the upper left corner */
    long stride;           /* bytes from one row to the next */
    int pixel_bytes;       /* 3: RGB, 4: RGBX */
} Pixels;

/* The crop (`left`, `top`, `width`, `height`) of an image is resized to `out_width` × `out_height`. The output is the
   window of `window_width` × `window_height` at (`window_left`, `window_top`) of that, mirrored if `flip`. */
typedef struct {
    int left, top, width, height;
    int out_width, out_height;
    int window_left, window_top, window_width, window_height;
    int bicubic; /* else bilinear */
    int flip;
} CropResizeParams;

/* How one axis is resized: output i is the sum over t < count[i] of weights[i * taps + t] * input[first[i] + t]. */
typedef struct {
    int outputs, taps;
    int low, high; /* only inputs low … high - 1 are used */
    int *first, *count;
    int32_t *weights;
} Axis;

int make_axes(Axis *across, Axis *down, const CropResizeParams *params);
void free_axis(Axis *axis);
int valid_params(const CropResizeParams *params, int image_width, int image_height);
int resize_window(const CropResizeParams *params, const Axis *across, const Axis *down, Pixels source, uint8_t *out);

#endif
