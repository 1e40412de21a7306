/* Of the JPEG decoder: what jpeg.c offers, and what it has from jpeg_head.c and jpeg_pixels.c. */

#ifndef SWIN_JPEG_H
#define SWIN_JPEG_H

#include <stdint.h>

/* Columns left … right - 1 and rows top … bottom - 1 of an image; decoded, they are in `pixels` (RGBX), whose first
   column and row are those of the image that are named. */
typedef struct {
    int left, top, right, bottom;
    uint8_t *pixels;
    long stride;
    int first_column, first_row;
} Part;

#define FAST 10 /* bits of a code, or of a code and the number behind it, that are looked up at once */

/* A Huffman table. `fast`, by the next FAST bits: 0 where the code is longer. Where the number behind the code is within
   those bits as well: bits taken | PLAIN | (run + 1) << RUN | number << NUMBER. Else bits of the code | symbol << RUN,
   and so too where there is no number: end of block, sixteen zeros, a difference of 0. */
typedef struct {
    int32_t fast[1 << FAST];
    int32_t limit[18];  /* of codes of each length, aligned to 16 bits: the first code that is longer */
    int32_t offset[17]; /* from a code to the place of its symbol */
    uint8_t symbols[256];
    int there;
} Table;

enum { BITS_TAKEN = 63, PLAIN = 64, RUN = 8, NUMBER = 16 };

typedef struct {
    int id, across, down, table, dc, ac;
} Component;

typedef struct {
    int width, height, count, restart;
    int jfif, adobe; /* adobe: -1, or its transform */
    Component component[3];
    int quantisation_there[4];
    int32_t quantisation[4][64 + 16]; /* by k */
    Table dc[4], ac[4];
} Head;

static inline int extended(int number, int size) { /* T.81, figure F.12 */
    return number < 1 << (size - 1) ? number - (1 << size) + 1 : number;
}

int jpeg_part(const uint8_t *data, long length, int width, int height, Part *part);

int read_head(const uint8_t *data, long length, Head *head, long *scan);

void inverse_dct(int32_t *coefficients, int last, uint8_t *out, long stride);
void upsample(const uint8_t *near, const uint8_t *far, int from, int to, int16_t *sums, uint8_t *out);
void grey_to_rgb(const uint8_t *y, int count, uint32_t *out);
void ycc_to_rgb(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int count, uint32_t *out);

#endif
