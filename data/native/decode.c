/* From a JPEG to the resized crop of it. Whatever is not plain and sound is answered with NOT_FOR_ME, and the caller
   lets Pillow decide, so that odd and corrupt files come out as they do there. */

#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "jpeg.h"

static int u16(const uint8_t *at) {
    return at[0] << 8 | at[1];
}

static int begins(const uint8_t *body, int length, const char *with, int with_length) {
    return length >= with_length && !memcmp(body, with, with_length);
}

/* What one segment of the head means: `body` of `length` bytes behind `marker`. */
static int look_at(int marker, const uint8_t *body, int length, int *size) {
    switch (marker) {
    case 0xC0: case 0xC1: /* frame: baseline or extended; 8 bits; grey or colour */
        if (size[0] || length < 6 || body[0] != 8 || (body[5] != 1 && body[5] != 3) || length != 6 + 3 * body[5])
            return NOT_FOR_ME;
        size[0] = u16(body + 3);
        size[1] = u16(body + 1);
        return size[0] && size[1] ? OK : NOT_FOR_ME;
    case 0xDB: /* quantisation tables */
        for (int at = 0; at < length; at += body[at] >> 4 ? 129 : 65)
            if (at + (body[at] >> 4 ? 129 : 65) > length)
                return NOT_FOR_ME;
        return OK;
    case 0xC4: case 0xDA: case 0xDD: case 0xFE: /* Huffman tables, scan, restarts, comment */
        return OK;
    case 0xE0:
        return begins(body, length, "JFIF", 4) && length < 14 ? NOT_FOR_ME : OK;
    case 0xE1:
        return begins(body, length, "Exif\0\0", 6) ? ASK_PILLOW : OK;
    case 0xE2:
        if (begins(body, length, "ICC_PROFILE\0", 12))
            return length < 14 ? NOT_FOR_ME : OK;
        return begins(body, length, "MPF\0", 4) ? NOT_FOR_ME : OK;
    case 0xED:
        return begins(body, length, "Photoshop 3.0\0", 14) ? ASK_PILLOW : OK;
    case 0xEE:
        return begins(body, length, "Adobe", 5) && length < 12 ? NOT_FOR_ME : OK;
    default:
        return marker >= 0xE3 && marker <= 0xEF ? OK : NOT_FOR_ME;
    }
}

/* Width and height from the head of a JPEG, into size[2]. ASK_PILLOW: fit to be decoded here, if Pillow, which reads
   more of the head (EXIF, Photoshop's resources) and refuses an image over it, opens it. */
int swin_jpeg_size(const uint8_t *data, long length, int *size) {
    int answer = OK;
    size[0] = size[1] = 0;
    if (length < 4 || data[0] != 0xFF || data[1] != 0xD8)
        return NOT_FOR_ME;
    for (long at = 2;;) {
        if (at + 4 > length || data[at] != 0xFF)
            return NOT_FOR_ME;
        int marker = data[at + 1], segment = u16(data + at + 2);
        if (segment < 2 || at + 2 + segment > length)
            return NOT_FOR_ME;
        int found = look_at(marker, data + at + 4, segment - 2, size);
        if (found == NOT_FOR_ME)
            return NOT_FOR_ME;
        answer = found == ASK_PILLOW ? ASK_PILLOW : answer;
        if (marker == 0xDA)
            return size[0] ? answer : NOT_FOR_ME;
        at += 2 + segment;
    }
}

/* The window of `job` out of a JPEG of `image_width` × `image_height` into `out` (window height, window width, 3). */
int swin_jpeg_resize(const uint8_t *data, long length, int image_width, int image_height, const Job *job,
                     uint8_t *out) {
    Axis across, down;
    if (!job_is_sound(job, image_width, image_height) || axes_make(&across, &down, job))
        return NOT_FOR_ME;
    Part part = {
        .left = job->left + across.low, .right = job->left + across.high,
        .top = job->top + down.low, .bottom = job->top + down.high,
    };
    int result = jpeg_part(data, length, image_width, image_height, &part);
    if (result == OK) {
        long row = job->top - part.first_row, column = job->left - part.first_column;
        Pixels source = {part.pixels + row * part.stride + 4 * column, part.stride, 4};
        result = resize_window(job, &across, &down, source, out);
    }
    free(part.pixels);
    axis_free(&across);
    axis_free(&down);
    return result;
}
