/* Shared by the files of the JPEG decoder. */

#ifndef SWIN_JPEG_H
#define SWIN_JPEG_H

#include <stdint.h>

/* Columns left … right - 1 and rows top … bottom - 1 of an image. After decoding they are in `pixels` (RGBX), which
   begins at column `first_column` and row `first_row` of the image. */
typedef struct {
    int left, top, right, bottom;
    uint8_t *pixels;
    long stride;
    int first_column, first_row;
} Region;

#define LOOKUP_BITS 10 /* bits that are looked up at once: a code, or a code and the value after it */

/* A Huffman table. `lookup` is indexed by the next LOOKUP_BITS bits. Its entries are:
   - 0 if the code is longer;
   - bits of code and value | COMBINED | (run + 1) << RUN | value << VALUE if the value after the code fits as well;
   - bits of the code | symbol << RUN otherwise. This includes codes without a value: end of block, sixteen zeros, and a
     DC difference of 0. */
typedef struct {
    int32_t lookup[1 << LOOKUP_BITS];
    int32_t limit[18];  /* for each length, aligned to 16 bits: the first code that is longer */
    int32_t offset[17]; /* for each length: index of a code's symbol minus the code */
    uint8_t symbols[256];
    int defined;
} HuffmanTable;

enum { BITS_USED = 63, COMBINED = 64, RUN = 8, VALUE = 16 };

typedef struct {
    int id, h_factor, v_factor, table, dc, ac;
} Component;

typedef struct {
    int width, height, count, restart;
    int jfif, adobe; /* adobe: the transform of the Adobe segment, -1 without one */
    Component component[3];
    int quantisation_defined[4];
    int32_t quantisation[4][64 + 16]; /* in zigzag order */
    HuffmanTable dc[4], ac[4];
} JpegHeader;

static inline int sign_extend(int bits, int size) { /* T.81, figure F.12 */
    return bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
}

/* Decodes a region of a JPEG of `width` × `height`. The caller frees region->pixels, also after a failure. */
int decode_jpeg_region(const uint8_t *data, long length, int width, int height, Region *region);

/* Reads everything before the entropy-coded data, which begin at *scan. Returns CHECK_WITH_PILLOW if the image can be
   decoded here but has segments that Pillow parses further (EXIF, Photoshop's resources) and may refuse. */
int read_jpeg_header(const uint8_t *data, long length, JpegHeader *header, long *scan);

void inverse_dct(int32_t *coefficients, int last, uint8_t *out, long stride);
void upsample(const uint8_t *near, const uint8_t *far, int from, int to, int16_t *sums, uint8_t *out);
void grey_to_rgb(const uint8_t *y, int count, uint32_t *out);
void ycc_to_rgb(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int count, uint32_t *out);

#endif
