/* Exported functions of the JPEG decoder: an image's size, and a resized crop of it. They return UNSUPPORTED for every
   JPEG that is not baseline and free of errors. The caller then lets Pillow decode, so that unusual and corrupt files
   give the result that Pillow gives. */

#include <stdlib.h>

#include "image.h"
#include "jpeg.h"

/* Writes width and height to size[2]. Returns the status of `read_jpeg_header`. */
int swin_jpeg_size(const uint8_t *data, long length, int *size) {
    JpegHeader header;
    long scan;
    int status = read_jpeg_header(data, length, &header, &scan);
    size[0] = header.width;
    size[1] = header.height;
    return status;
}

/* Crops and resizes a JPEG of `image_width` × `image_height` into `out`, (window height, window width, 3). */
int swin_jpeg_resize(const uint8_t *data, long length, int image_width, int image_height,
                     const CropResizeParams *params, uint8_t *out) {
    Axis across, down;
    if (!valid_params(params, image_width, image_height) || make_axes(&across, &down, params))
        return UNSUPPORTED;
    Region region = {
        .left = params->left + across.low, .right = params->left + across.high,
        .top = params->top + down.low, .bottom = params->top + down.high,
    };
    int result = decode_jpeg_region(data, length, image_width, image_height, &region);
    if (result == OK) {
        long row = params->top - region.first_row, column = params->left - region.first_column;
        Pixels source = {region.pixels + row * region.stride + 4 * column, region.stride, 4};
        result = resize_window(params, &across, &down, source, out);
    }
    free(region.pixels);
    free_axis(&across);
    free_axis(&down);
    return result;
}
