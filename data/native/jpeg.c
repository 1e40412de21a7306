/* Baseline JPEG (ITU-T T.81): decodes of an image only what a crop needs, to the pixels of libjpeg-turbo.

   Blocks before and beside the crop are only entropy-decoded, what comes after it is not decoded at all. The arithmetic
   is that of libjpeg's accurate integer DCT, of its triangle filter for chroma and of its conversion to RGB, which its
   vector code has in common with its plain code, so pixels are equal to the bit.

   Strict: whatever is not plain and sound is answered with NOT_FOR_ME, and the caller lets Pillow decide. Among that
   are progressive images, colours other than grey and YCbCr, data that end early or have markers where none belong,
   and blocks with coefficients so large that intermediate results would not fit into the 16 bits of vector code. */

#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "jpeg.h"

#define PADDING 4096       /* bytes behind the data that may be read: more than the longest MCU takes */
#define LARGEST_BLOCK 5800 /* sum of a block's magnitudes: then no intermediate result of libjpeg's vector code wraps */

static const uint8_t natural[64 + 16] = { /* place in the block of the k-th coefficient; behind the last: nowhere */
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
};

typedef struct {
    uint64_t bits; /* the next ones from the top */
    int left;      /* of them, at least */
    const uint8_t *next;
} Reader;

/* The scan without its stuffed zeros, and where each restart interval begins in that; `starts` has intervals + 1
   places. Fails unless exactly so many intervals lie between here and the end of the image. */
static int unstuff(const uint8_t *at, const uint8_t *end, uint8_t *out, long *starts, long intervals) {
    const uint8_t *begin = out;
    long interval = 0;
    starts[0] = 0;
    for (;;) {
        const uint8_t *found = memchr(at, 0xFF, end - at);
        if (!found || end - found < 2)
            return NOT_FOR_ME;
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
            return NOT_FOR_ME;
    }
    starts[++interval] = out - begin;
    memset(out, 0, PADDING);
    return interval == intervals ? OK : NOT_FOR_ME;
}

#define INLINE static inline __attribute__((always_inline))

INLINE void refill(Reader *reader) {
    uint64_t word;
    memcpy(&word, reader->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    reader->bits |= word >> reader->left;
    reader->next += (63 - reader->left) >> 3;
    reader->left |= 56;
}

INLINE void drop(Reader *reader, int count) {
    reader->bits <<= count;
    reader->left -= count;
}

/* The entry of the next code, whose bits (and those of its number, where it is plain) are taken. */
INLINE int32_t next_entry(Reader *reader, const Table *table) {
    int32_t entry = table->fast[reader->bits >> (64 - FAST)];
    drop(reader, entry & BITS_TAKEN);
    return entry;
}

/* The symbol of an entry that is not plain; -1 where there is no such code. */
INLINE int symbol_of(Reader *reader, const Table *table, int32_t entry) {
    if (entry)
        return entry >> RUN;
    int code = (int)(reader->bits >> 48), length = FAST + 1;
    while (length < 17 && code >= table->limit[length])
        length++;
    if (length == 17)
        return -1;
    drop(reader, length);
    return table->symbols[((code >> (16 - length)) + table->offset[length]) & 255];
}

INLINE int number_of(Reader *reader, int size) {
    int bits = (int)(reader->bits >> (64 - size));
    drop(reader, size);
    return extended(bits, size);
}

INLINE long put(int32_t *out, int k, int value) {
    out[natural[k]] = value;
    return value < 0 ? -(long)value : value;
}

/* The coefficients of a block but the first. With `out`, where all is zero, dequantised ones go there and *sum grows by
   their magnitudes; without, they are passed over. Returns the last k that is not zero, or -1 if something is wrong. */
INLINE int read_ac(Reader *reader, const Table *table, const int32_t *quantisation, int32_t *out, long *sum) {
    int k = 0;
    while (k < 63) {
        refill(reader); /* 56 bits: enough for two plain entries and any third */
        int32_t entry = 0;
        for (int i = 0; i < 3; i++) {
            entry = next_entry(reader, table);
            if (!(entry & PLAIN))
                break;
            k += entry >> RUN & 31;
            if (out)
                *sum += put(out, k, (entry >> NUMBER) * quantisation[k]);
            if (k >= 63)
                break;
        }
        if (entry & PLAIN)
            continue;
        int symbol = symbol_of(reader, table, entry), size = symbol & 15;
        if (symbol < 0 || size > 10)
            return -1;
        if (size) {
            k += (symbol >> 4) + 1;
            int number = number_of(reader, size);
            if (out && k < 64)
                *sum += put(out, k, number * quantisation[k]);
        } else if (symbol >> 4 == 15)
            k += 16;
        else
            return k;
    }
    return k == 63 ? k : -1;
}

/* One block. With `out`, as above; *last is then the last k that is not zero. */
INLINE int read_block(Reader *reader, const Table *dc, const Table *ac, const int32_t *quantisation, int *before,
                      int32_t *out, int *last) {
    refill(reader);
    int32_t entry = next_entry(reader, dc);
    int number = entry >> NUMBER;
    if (!(entry & PLAIN)) {
        int size = symbol_of(reader, dc, entry);
        if (size < 0 || size > 11)
            return NOT_FOR_ME;
        number = size ? number_of(reader, size) : 0;
    } else if ((entry >> RUN & 31) != 1)
        return NOT_FOR_ME;
    *before += number;
    long sum = 0;
    if (out)
        sum = put(out, 0, *before * quantisation[0]);
    *last = read_ac(reader, ac, quantisation, out, &sum);
    return *last < 0 || sum > LARGEST_BLOCK ? NOT_FOR_ME : OK;
}

/* -------------------------------------------------------------------------------------------------------- decoding */

typedef struct {
    Head head;
    int m0, m1, r0, r1;  /* columns and rows of MCUs that are kept */
    uint8_t *plane[3];   /* of those */
    long stride[3];
} Work;

static int read_mcus(Work *work, const uint8_t *data, const long *starts) {
    Head *head = &work->head;
    int wide = 8 * head->component[0].across, columns = (head->width + wide - 1) / wide;
    int until = head->restart, interval = 0, before[3] = {0, 0, 0};
    Reader reader = {0, 0, data};
    const uint8_t *end = data + starts[1];
    for (int row = 0; row < work->r1; row++)
        for (int column = 0; column < columns; column++) {
            if (head->restart && until-- == 0) {
                until = head->restart - 1;
                if (reader.next - reader.left / 8 > end)
                    return NOT_FOR_ME;
                interval++;
                reader = (Reader){0, 0, data + starts[interval]};
                end = data + starts[interval + 1];
                memset(before, 0, sizeof before);
            }
            int keep = row >= work->r0 && column >= work->m0 && column < work->m1;
            for (int c = 0; c < head->count; c++) {
                const Component *component = head->component + c;
                const Table *dc = head->dc + component->dc, *ac = head->ac + component->ac;
                for (int block = 0; block < component->across * component->down; block++) {
                    int last;
                    if (!keep) {
                        if (read_block(&reader, dc, ac, NULL, before + c, NULL, &last))
                            return NOT_FOR_ME;
                        continue;
                    }
                    int32_t coefficients[64] __attribute__((aligned(64))) = {0};
                    if (read_block(&reader, dc, ac, head->quantisation[component->table], before + c, coefficients, &last))
                        return NOT_FOR_ME;
                    long x = (column - work->m0) * component->across + block % component->across;
                    long y = (row - work->r0) * component->down + block / component->across;
                    inverse_dct(coefficients, last, work->plane[c] + 8 * y * work->stride[c] + 8 * x, work->stride[c]);
                }
            }
            if (reader.next > end + 8)
                return NOT_FOR_ME;
        }
    return reader.next - reader.left / 8 > end ? NOT_FOR_ME : OK;
}

/* ------------------------------------------------------------------------------------------------------- the crop */

static int least(int a, int b) {
    return a < b ? a : b;
}

/* Which MCUs are needed: of a halved chroma, a sample on each side of the crop's own. */
static void choose_mcus(Work *work, const Part *part) {
    const Component *first = work->head.component;
    int wide = 8 * first->across, high = 8 * first->down;
    int beside = first->across == 2 ? 2 : 0, above = first->down == 2 ? 2 : 0;
    work->m0 = (part->left > beside ? part->left - beside : 0) / wide;
    work->m1 = (least(part->right + beside, work->head.width) - 1) / wide + 1;
    work->r0 = (part->top > above ? part->top - above : 0) / high;
    work->r1 = (least(part->bottom + above, work->head.height) - 1) / high + 1;
}

static int make_rows(Work *work, Part *part) {
    const Head *head = &work->head;
    const Component *first = head->component;
    int x0 = work->m0 * 8 * first->across, x1 = least(work->m1 * 8 * first->across, head->width);
    int chroma_width = (head->width + first->across - 1) / first->across;
    int chroma_height = (head->height + first->down - 1) / first->down;
    int from = work->m0 * 8, to = least(work->m1 * 8, chroma_width);
    part->first_column = x0;
    part->first_row = part->top;
    part->stride = 4L * (x1 - x0);
    part->pixels = malloc(part->stride * (part->bottom - part->top));
    uint8_t *rows = malloc(2L * 2 * 8 * (work->m1 - work->m0) + 64);
    int16_t *sums = malloc(sizeof(int16_t) * (8L * (work->m1 - work->m0) + 32));
    if (!part->pixels || !rows || !sums) {
        free(rows);
        free(sums);
        return NOT_FOR_ME;
    }
    for (int row = part->top; row < part->bottom; row++) {
        uint32_t *out = (uint32_t *)(part->pixels + part->stride * (row - part->top));
        const uint8_t *y = work->plane[0] + work->stride[0] * (row - work->r0 * 8 * first->down);
        const uint8_t *chroma[2];
        for (int c = 1; c < head->count; c++) {
            int at = row / first->down, other = row % first->down ? at + 1 : at - 1;
            other = other < 0 ? 0 : least(other, chroma_height - 1);
            const uint8_t *plane = work->plane[c] - work->stride[c] * work->r0 * 8;
            const uint8_t *near = plane + work->stride[c] * at, *far = plane + work->stride[c] * other;
            uint8_t *full = rows + (c - 1) * (long)2 * 8 * (work->m1 - work->m0);
            chroma[c - 1] = near;
            if (first->across == 2) {
                upsample(near - from, first->down == 2 ? far - from : NULL, from, to, sums, full);
                chroma[c - 1] = full;
            }
        }
        if (head->count == 1)
            grey_to_rgb(y, x1 - x0, out);
        else
            ycc_to_rgb(y, chroma[0], chroma[1], x1 - x0, out);
    }
    free(rows);
    free(sums);
    return OK;
}

static int make_planes(Work *work, const uint8_t *data, const long *starts) {
    int result = NOT_FOR_ME, there = 1;
    for (int c = 0; c < work->head.count; c++) {
        const Component *component = work->head.component + c;
        work->stride[c] = 8L * component->across * (work->m1 - work->m0);
        work->plane[c] = malloc(work->stride[c] * 8 * component->down * (work->r1 - work->r0));
        there = there && work->plane[c];
    }
    if (there)
        result = read_mcus(work, data, starts);
    return result;
}

/* `part->left` … `part->bottom` of a JPEG into part->pixels (to be freed by the caller, also after a failure). */
int jpeg_part(const uint8_t *data, long length, int width, int height, Part *part) {
    Work *work = malloc(sizeof *work);
    uint8_t *plain = NULL;
    long *starts = NULL, scan;
    int result = NOT_FOR_ME;
    part->pixels = NULL;
    if (!work)
        return NOT_FOR_ME;
    memset(work->plane, 0, sizeof work->plane);
    Head *head = &work->head;
    if (read_head(data, length, head, &scan) == OK && head->width == width && head->height == height) {
        const Component *first = head->component;
        long mcus = ((width - 1L) / (8 * first->across) + 1) * ((height - 1L) / (8 * first->down) + 1);
        long intervals = head->restart ? (mcus - 1) / head->restart + 1 : 1;
        intervals = intervals > length - scan ? 0 : intervals; /* more than the data can have */
        plain = malloc(length - scan + PADDING);
        starts = malloc(sizeof(long) * (intervals + 1));
        choose_mcus(work, part);
        if (plain && starts && intervals && unstuff(data + scan, data + length, plain, starts, intervals) == OK)
            result = make_planes(work, plain, starts);
        if (result == OK)
            result = make_rows(work, part);
    }
    for (int c = 0; c < 3; c++)
        free(work->plane[c]);
    free(plain);
    free(starts);
    free(work);
    return result;
}
