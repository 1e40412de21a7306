/* Decodes crops of mutated JPEGs, to be compiled with sanitizers: fuzz_jpeg COUNT SEED FILES…

   Each input has a buffer of exactly its size on the heap, as has each result, so that a sanitizer notices any access
   beyond. Prints how many inputs there were, how many headers were accepted and how many crops decoded. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "inputs.h"

#define MAX_BYTES 8192
#define MAX_DECODED 4000000L /* pixels of an image of which more than a small crop is decoded */

int swin_jpeg_size(const uint8_t *data, long length, int *size);
int swin_jpeg_resize(const uint8_t *data, long length, int image_width, int image_height,
                     const CropResizeParams *params, uint8_t *out);

static struct {
    long inputs, accepted, decoded;
} total;

/* ------------------------------------------------------------------------------------------------- the mutations */

typedef struct {
    uint8_t bytes[MAX_BYTES + 64];
    long length;
} File;

/* The offset of segment `number` of the header, and its length with the marker; -1 if there are fewer. */
static long find_segment(const File *file, int number, long *length) {
    for (long at = 2, i = 0; at + 4 <= file->length && file->bytes[at] == 0xFF; i++, at += *length) {
        *length = 2 + (file->bytes[at + 2] << 8 | file->bytes[at + 3]);
        if (at + *length > file->length)
            return -1;
        if (i == number)
            return at;
        if (file->bytes[at + 1] == 0xDA)
            return -1;
    }
    return -1;
}

/* A segment with one of the markers, or any segment if `first` is 0; -1 if there is none. */
static long pick_segment(const File *file, int first, int second, long *length) {
    long found = -1, at, size;
    int seen = 0;
    for (int i = 0; (at = find_segment(file, i, &size)) >= 0; i++) {
        int marker = file->bytes[at + 1];
        if ((!first || marker == first || marker == second) && below(++seen) == 0) {
            found = at;
            *length = size;
        }
    }
    return found;
}

/* The offset of the entropy-coded data; 2 without one. */
static long scan_of(const File *file) {
    long length = 0, at = pick_segment(file, 0xDA, 0xDA, &length);
    return at < 0 ? 2 : at + length;
}

static void insert(File *file, long at, const uint8_t *bytes, long count) {
    if (file->length + count > MAX_BYTES)
        return;
    memmove(file->bytes + at + count, file->bytes + at, file->length - at);
    memcpy(file->bytes + at, bytes, count);
    file->length += count;
}

static void change_bytes(File *file) {
    long range = below(2) && file->length > 700 ? 700 : file->length;
    for (int i = 1 + below(4); i > 0; i--)
        file->bytes[below(range)] = below(3) ? random_bits() : 255;
}

static void remove_bytes(File *file) {
    long at = below(file->length), count = 1 + below(20);
    count = at + count > file->length ? file->length - at : count;
    memmove(file->bytes + at, file->bytes + at + count, file->length - at - count);
    file->length -= count;
}

static void insert_bytes(File *file) {
    uint8_t bytes[6];
    for (int i = 0; i < 6; i++)
        bytes[i] = ONE_OF(255, 0xD9, 0xD8, 0xD0, 0xDA, 0, 7);
    insert(file, below(file->length), bytes, 1 + below(6));
}

static void change_segment(File *file) {
    long length, at = pick_segment(file, 0, 0, &length);
    if (at >= 0 && length > 4)
        for (int i = 1 + below(4); i > 0; i--)
            file->bytes[at + 4 + below(length - 4)] =
                below(2) ? ONE_OF(0, 1, 2, 255, 15, 16, 17, 127, 128) : (int)random_bits();
}

static void change_frame(File *file) { /* height, width, sampling, coding, or a field of a component */
    long length, at = pick_segment(file, 0xC0, 0xC1, &length);
    if (at < 0 || length < 13)
        return;
    uint8_t *frame = file->bytes + at;
    int kind = below(5);
    if (kind < 2) {
        int side = below(3) ? ONE_OF(1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 255, 256, 4096, 65500, 65535, 0) : below(300);
        frame[5 + 2 * kind] = side >> 8;
        frame[6 + 2 * kind] = side;
    } else if (kind == 2)
        frame[11] = ONE_OF(0x11, 0x21, 0x22, 0x12, 0x41, 0x44, 0x14, 0x00);
    else if (kind == 3)
        frame[1] ^= 1;
    else
        frame[10 + below(length - 10)] = below(5);
}

static void change_restarts(File *file) { /* another interval, or a marker in the data */
    if (below(2)) {
        uint8_t segment[] = {0xFF, 0xDD, 0, 4, below(4) ? 0 : random_bits(), below(2) ? 1 + below(4) : random_bits()};
        insert(file, 2, segment, sizeof segment);
    } else {
        uint8_t marker[] = {0xFF, below(3) ? ONE_OF(0, 0xD0, 0xD1, 0xD2, 0xD3, 0xD7, 0xD9, 0xFF, 0xDA) : 0xD0 + below(8)};
        long scan = scan_of(file);
        insert(file, scan + below(file->length - scan), marker, 2);
    }
}

static void change_codes(File *file) { /* moves codes of a Huffman table to another length: most stay prefix codes */
    long length, at = pick_segment(file, 0xC4, 0xC4, &length);
    if (at < 0 || length < 21)
        return;
    uint8_t *counts = file->bytes + at + 5;
    long symbols = 0;
    for (int i = 0; i < 16; i++)
        symbols += counts[i];
    if (!symbols || 21 + symbols > length)
        return;
    int from = below(16), to = below(16), moved = 1 + below(8);
    if (counts[from] >= moved) {
        counts[from] -= moved;
        counts[to] += moved;
    }
    if (below(2))
        counts[16 + below(symbols)] = random_bits();
}

static void change_scan(File *file) {
    long scan = scan_of(file);
    for (int i = 1 + below(6); i > 0 && scan < file->length; i--)
        file->bytes[scan + below(file->length - scan)] = below(3) ? (int)random_bits() : ONE_OF(0, 254);
}

static void mutate(File *file) {
    static void (*const kinds[])(File *) = {
        change_bytes, change_bytes, remove_bytes, insert_bytes,    change_segment,
        change_frame, change_codes, change_codes, change_restarts, change_scan,
    };
    if (file->length > 64)
        kinds[below(sizeof kinds / sizeof *kinds)](file);
}

/* ------------------------------------------------------------------------------------------------------ decoding */

static CropResizeParams random_params(int width, int height) {
    CropResizeParams p = {0, 0, width, height, 48, 48, 0, 0, 0, 0, below(2), below(2)};
    int small = (long)width * height > MAX_DECODED || below(5) == 0;
    if (below(4)) {
        p.width = 1 + below(small && width > 32 ? 32 : width);
        p.height = 1 + below(small && height > 32 ? 32 : height);
        int at_end = below(3) == 0;
        p.left = at_end ? width - p.width : below(width - p.width + 1);
        p.top = at_end ? height - p.height : below(height - p.height + 1);
    } else if (small) {
        p.width = width > 32 ? 32 : width;
        p.height = height > 32 ? 32 : height;
    }
    if (below(4) == 0 && (long)p.width * p.height < 300000) {
        p.out_width = p.width;
        p.out_height = p.height;
    } else if (below(2)) {
        p.out_width = 1 + below(80);
        p.out_height = 1 + below(80);
    }
    p.window_width = below(3) ? p.out_width : 1 + below(p.out_width);
    p.window_height = below(3) ? p.out_height : 1 + below(p.out_height);
    p.window_left = below(p.out_width - p.window_width + 1);
    p.window_top = below(p.out_height - p.window_height + 1);
    if (below(16) == 0) /* any number in any field: refused, or within bounds */
        ((int *)&p)[below(12)] = (int)random_bits() >> below(32);
    return p;
}

static void decode(const File *file) {
    uint8_t *data = malloc(file->length ? file->length : 1);
    int size[2];
    memcpy(data, file->bytes, file->length);
    total.inputs++;
    if (swin_jpeg_size(data, file->length, size) != UNSUPPORTED && (long)size[0] * size[1] <= 89478485L) {
        CropResizeParams params = random_params(size[0], size[1]);
        long bytes = 3L * params.window_width * params.window_height;
        int possible = params.window_width > 0 && params.window_height > 0 && bytes < 100000000L;
        uint8_t *out = malloc(possible ? bytes : 1);
        total.accepted++;
        if (possible && swin_jpeg_resize(data, file->length, size[0], size[1], &params, out) == OK)
            total.decoded++;
        free(out);
    }
    free(data);
}

int main(int count, char **arguments) {
    static File seeds[64], file;
    int files = 0;
    for (int i = 3; i < count && files < 64; i++) {
        FILE *opened = fopen(arguments[i], "rb");
        if (!opened)
            return 2;
        seeds[files].length = (long)fread(seeds[files].bytes, 1, MAX_BYTES, opened);
        fclose(opened);
        files++;
    }
    long inputs = count > 2 ? atol(arguments[1]) : 0;
    for (long i = 0; i < inputs && files; i++) {
        seed_random(atol(arguments[2]) * 1000003L + i); /* so that each input can be repeated alone */
        file = seeds[i % files];
        for (int k = i < files ? 0 : 1 + below(4); k > 0; k--)
            mutate(&file);
        decode(&file);
    }
    printf("%ld inputs, %ld accepted, %ld decoded\n", total.inputs, total.accepted, total.decoded);
    return 0;
}
