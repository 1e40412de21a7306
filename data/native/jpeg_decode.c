/* Decodes the region of a baseline JPEG (ITU-T T.81) that a crop needs, bit-equal to libjpeg-turbo.

   Blocks before the region, and to its left and right, are only entropy-decoded; rows after it are not decoded at all.
   The arithmetic is that of libjpeg's accurate integer DCT, of its triangle filter for chroma and of its conversion to
   RGB. libjpeg-turbo's vector code and plain code both give these results.

   Strict: the functions return UNSUPPORTED for everything else, and the caller lets Pillow decide. Unsupported are
   progressive images, colours other than grey and YCbCr, data that end early or contain misplaced markers, and blocks
   with coefficients so large that intermediate results would overflow the 16 bits of libjpeg-turbo's vector code. */

#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "jpeg.h"

#define PADDING 4096       /* bytes after the data that may be read: more than the longest MCU has */
#define MAX_BLOCK_MAGNITUDE 5800 /* up to this sum, libjpeg-turbo's vector code does not overflow */

static const uint8_t zigzag[64 + 16] = { /* position in the block of coefficient k; padded for runs past the end */
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
};

typedef struct {
    uint64_t bits; /* the next bits, from the top */
    int count;     /* at least this many of `bits` are valid */
    const uint8_t *next;
} BitReader;

/* Copies the scan without its stuffed zeros. Writes to `starts`, which has intervals + 1 elements, where each restart
   interval begins in the copy. Fails unless there are exactly `intervals` intervals before the end of the image. */
static int remove_stuffing(const uint8_t *at, const uint8_t *end, uint8_t *out, long *starts, long intervals) {
    const uint8_t *begin = out;
    long interval = 0;
    starts[0] = 0;
    for (;;) {
        const uint8_t *found = memchr(at, 0xFF, end - at);
        if (!found || end - found < 2)
            return UNSUPPORTED;
        memcpy(out, at, found - at);
        out += found - at;
        at = found + 2;
        if (found[1] == 0)
            *out++ = 0xFF;
        else if (found[1] == 0xD9)
            break;
        else if (found[1] == (0xD0 | (interval & 7)) && interval + 1 < intervals)
            starts[++interval] = out - begin;
        else
            return UNSUPPORTED;
    }
    starts[++interval] = out - begin;
    memset(out, 0, PADDING);
    return interval == intervals ? OK : UNSUPPORTED;
}

#define INLINE static inline __attribute__((always_inline))

INLINE void refill(BitReader *reader) {
    uint64_t word;
    memcpy(&word, reader->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    reader->bits |= word >> reader->count;
    reader->next += (63 - reader->count) >> 3;
    reader->count |= 56;
}

INLINE void skip_bits(BitReader *reader, int count) {
    reader->bits <<= count;
    reader->count -= count;
}

/* Looks up the next code and skips its bits (of a combined entry, also those of its value). */
INLINE int32_t next_entry(BitReader *reader, const HuffmanTable *table) {
    int32_t entry = table->lookup[reader->bits >> (64 - LOOKUP_BITS)];
    skip_bits(reader, entry & BITS_USED);
    return entry;
}

/* The symbol of an entry that is not combined; -1 if there is no such code. */
INLINE int read_symbol(BitReader *reader, const HuffmanTable *table, int32_t entry) {
    if (entry)
        return entry >> RUN;
    int code = (int)(reader->bits >> 48), length = LOOKUP_BITS + 1;
    while (length < 17 && code >= table->limit[length])
        length++;
    if (length == 17)
        return -1;
    skip_bits(reader, length);
    return table->symbols[((code >> (16 - length)) + table->offset[length]) & 255];
}

INLINE int read_value(BitReader *reader, int size) {
    int bits = (int)(reader->bits >> (64 - size));
    skip_bits(reader, size);
    return sign_extend(bits, size);
}

INLINE long put(int32_t *out, int k, int value) {
    out[zigzag[k]] = value;
    return value < 0 ? -(long)value : value;
}

/* Reads the AC coefficients of a block. They are dequantised into `out`, which the caller has zeroed, and their
   magnitudes are added to *sum; with `out` NULL they are skipped. Returns the last k that is not zero, -1 for invalid
   data. */
INLINE int read_ac(BitReader *reader, const HuffmanTable *table, const int32_t *quantisation, int32_t *out, long *sum) {
    int k = 0;
    while (k < 63) {
        refill(reader); /* 56 bits: enough for two combined entries and any third */
        int32_t entry = 0;
        for (int i = 0; i < 3; i++) {
            entry = next_entry(reader, table);
            if (!(entry & COMBINED))
                break;
            k += entry >> RUN & 31;
            if (out)
                *sum += put(out, k, (entry >> VALUE) * quantisation[k]);
            if (k >= 63)
                break;
        }
        if (entry & COMBINED)
            continue;
        int symbol = read_symbol(reader, table, entry), size = symbol & 15;
        if (symbol < 0 || size > 10)
            return -1;
        if (size) {
            k += (symbol >> 4) + 1;
            int number = read_value(reader, size);
            if (out && k < 64)
                *sum += put(out, k, number * quantisation[k]);
        } else if (symbol >> 4 == 15)
            k += 16;
        else
            return k;
    }
    return k == 63 ? k : -1;
}

/* Reads one block. `out` is as above; *last is the last k that is not zero. */
INLINE int read_block(BitReader *reader, const HuffmanTable *dc, const HuffmanTable *ac, const int32_t *quantisation,
                      int *dc_predictor, int32_t *out, int *last) {
    refill(reader);
    int32_t entry = next_entry(reader, dc);
    int number = entry >> VALUE;
    if (!(entry & COMBINED)) {
        int size = read_symbol(reader, dc, entry);
        if (size < 0 || size > 11)
            return UNSUPPORTED;
        number = size ? read_value(reader, size) : 0;
    } else if ((entry >> RUN & 31) != 1)
        return UNSUPPORTED;
    *dc_predictor += number;
    long sum = 0;
    if (out)
        sum = put(out, 0, *dc_predictor * quantisation[0]);
    *last = read_ac(reader, ac, quantisation, out, &sum);
    return *last < 0 || sum > MAX_BLOCK_MAGNITUDE ? UNSUPPORTED : OK;
}

/* -------------------------------------------------------------------------------------------------------- decoding */

typedef struct {
    JpegHeader header;
    int mcu_left, mcu_right, mcu_top, mcu_bottom; /* the MCUs that are kept, without those at right and bottom */
    uint8_t *plane[3];                            /* samples of the kept MCUs */
    long stride[3];
} Decoder;

static int read_mcus(Decoder *decoder, const uint8_t *data, const long *starts) {
    JpegHeader *header = &decoder->header;
    int mcu_width = 8 * header->component[0].h_factor, columns = (header->width + mcu_width - 1) / mcu_width;
    int until_restart = header->restart, interval = 0, dc_predictor[3] = {0, 0, 0};
    BitReader reader = {0, 0, data};
    const uint8_t *end = data + starts[1];
    for (int row = 0; row < decoder->mcu_bottom; row++)
        for (int column = 0; column < columns; column++) {
            if (header->restart && until_restart-- == 0) {
                until_restart = header->restart - 1;
                if (reader.next - reader.count / 8 > end)
                    return UNSUPPORTED;
                interval++;
                reader = (BitReader){0, 0, data + starts[interval]};
                end = data + starts[interval + 1];
                memset(dc_predictor, 0, sizeof dc_predictor);
            }
            int keep = row >= decoder->mcu_top && column >= decoder->mcu_left && column < decoder->mcu_right;
            for (int c = 0; c < header->count; c++) {
                const Component *component = header->component + c;
                const HuffmanTable *dc = header->dc + component->dc, *ac = header->ac + component->ac;
                const int32_t *quantisation = header->quantisation[component->table];
                long stride = decoder->stride[c];
                for (int block = 0; block < component->h_factor * component->v_factor; block++) {
                    int last;
                    if (!keep) {
                        if (read_block(&reader, dc, ac, NULL, dc_predictor + c, NULL, &last))
                            return UNSUPPORTED;
                        continue;
                    }
                    int32_t coefficients[64] __attribute__((aligned(64))) = {0};
                    if (read_block(&reader, dc, ac, quantisation, dc_predictor + c, coefficients, &last))
                        return UNSUPPORTED;
                    long x = (column - decoder->mcu_left) * component->h_factor + block % component->h_factor;
                    long y = (row - decoder->mcu_top) * component->v_factor + block / component->h_factor;
                    inverse_dct(coefficients, last, decoder->plane[c] + 8 * y * stride + 8 * x, stride);
                }
            }
            if (reader.next > end + 8)
                return UNSUPPORTED;
        }
    return reader.next - reader.count / 8 > end ? UNSUPPORTED : OK;
}

/* ----------------------------------------------------------------------------------------------------- the region */

static int min_int(int a, int b) {
    return a < b ? a : b;
}

/* Selects the MCUs to keep. Halved chroma is interpolated, so it needs one more sample on each side of the region. */
static void select_mcus(Decoder *decoder, const Region *region) {
    const Component *first = decoder->header.component;
    int mcu_width = 8 * first->h_factor, mcu_height = 8 * first->v_factor;
    int margin_x = first->h_factor == 2 ? 2 : 0, margin_y = first->v_factor == 2 ? 2 : 0;
    decoder->mcu_left = (region->left > margin_x ? region->left - margin_x : 0) / mcu_width;
    decoder->mcu_right = (min_int(region->right + margin_x, decoder->header.width) - 1) / mcu_width + 1;
    decoder->mcu_top = (region->top > margin_y ? region->top - margin_y : 0) / mcu_height;
    decoder->mcu_bottom = (min_int(region->bottom + margin_y, decoder->header.height) - 1) / mcu_height + 1;
}

static int region_to_rgb(Decoder *decoder, Region *region) {
    const JpegHeader *header = &decoder->header;
    const Component *first = header->component;
    int mcu_width = 8 * first->h_factor;
    int x0 = decoder->mcu_left * mcu_width, x1 = min_int(decoder->mcu_right * mcu_width, header->width);
    int chroma_width = (header->width + first->h_factor - 1) / first->h_factor;
    int chroma_height = (header->height + first->v_factor - 1) / first->v_factor;
    int from = decoder->mcu_left * 8, to = min_int(decoder->mcu_right * 8, chroma_width);
    region->first_column = x0;
    region->first_row = region->top;
    region->stride = 4L * (x1 - x0);
    region->pixels = malloc(region->stride * (region->bottom - region->top));
    uint8_t *rows = malloc(2L * 2 * 8 * (decoder->mcu_right - decoder->mcu_left) + 64);
    int16_t *sums = malloc(sizeof(int16_t) * (8L * (decoder->mcu_right - decoder->mcu_left) + 32));
    if (!region->pixels || !rows || !sums) {
        free(rows);
        free(sums);
        return UNSUPPORTED;
    }
    for (int row = region->top; row < region->bottom; row++) {
        uint32_t *out = (uint32_t *)(region->pixels + region->stride * (row - region->top));
        const uint8_t *y = decoder->plane[0] + decoder->stride[0] * (row - decoder->mcu_top * 8 * first->v_factor);
        const uint8_t *chroma[2];
        for (int c = 1; c < header->count; c++) {
            int at = row / first->v_factor, other = row % first->v_factor ? at + 1 : at - 1;
            other = other < 0 ? 0 : min_int(other, chroma_height - 1);
            const uint8_t *plane = decoder->plane[c] - decoder->stride[c] * decoder->mcu_top * 8;
            const uint8_t *near = plane + decoder->stride[c] * at, *far = plane + decoder->stride[c] * other;
            uint8_t *full = rows + (c - 1) * (long)2 * 8 * (decoder->mcu_right - decoder->mcu_left);
            chroma[c - 1] = near;
            if (first->h_factor == 2) {
                upsample(near - from, first->v_factor == 2 ? far - from : NULL, from, to, sums, full);
                chroma[c - 1] = full;
            }
        }
        if (header->count == 1)
            grey_to_rgb(y, x1 - x0, out);
        else
            ycc_to_rgb(y, chroma[0], chroma[1], x1 - x0, out);
    }
    free(rows);
    free(sums);
    return OK;
}

static int decode_planes(Decoder *decoder, const uint8_t *data, const long *starts) {
    int result = UNSUPPORTED, allocated = 1;
    for (int c = 0; c < decoder->header.count; c++) {
        const Component *component = decoder->header.component + c;
        decoder->stride[c] = 8L * component->h_factor * (decoder->mcu_right - decoder->mcu_left);
        long rows = 8L * component->v_factor * (decoder->mcu_bottom - decoder->mcu_top);
        decoder->plane[c] = malloc(decoder->stride[c] * rows);
        allocated = allocated && decoder->plane[c];
    }
    if (allocated)
        result = read_mcus(decoder, data, starts);
    return result;
}

int decode_jpeg_region(const uint8_t *data, long length, int width, int height, Region *region) {
    Decoder *decoder = malloc(sizeof *decoder);
    uint8_t *unstuffed = NULL;
    long *starts = NULL, scan;
    int result = UNSUPPORTED;
    region->pixels = NULL;
    if (!decoder)
        return UNSUPPORTED;
    memset(decoder->plane, 0, sizeof decoder->plane);
    JpegHeader *header = &decoder->header;
    int status = read_jpeg_header(data, length, header, &scan);
    if (status != UNSUPPORTED && header->width == width && header->height == height) {
        const Component *first = header->component;
        long mcus = ((width - 1L) / (8 * first->h_factor) + 1) * ((height - 1L) / (8 * first->v_factor) + 1);
        long intervals = header->restart ? (mcus - 1) / header->restart + 1 : 1;
        intervals = intervals > length - scan ? 0 : intervals; /* more than the data can contain */
        unstuffed = malloc(length - scan + PADDING);
        starts = malloc(sizeof(long) * (intervals + 1));
        select_mcus(decoder, region);
        if (unstuffed && starts && intervals)
            result = remove_stuffing(data + scan, data + length, unstuffed, starts, intervals);
        if (result == OK)
            result = decode_planes(decoder, unstuffed, starts);
        if (result == OK)
            result = region_to_rgb(decoder, region);
    }
    for (int c = 0; c < 3; c++)
        free(decoder->plane[c]);
    free(unstuffed);
    free(starts);
    free(decoder);
    return result;
}
