/* Reads a JPEG's header (ITU-T T.81, annex B): frame, tables and scan. Strict: see jpeg_decode.c. */

#include <stddef.h>
#include <string.h>

#include "image.h"
#include "jpeg.h"

static int u16(const uint8_t *at) {
    return at[0] << 8 | at[1];
}

static int make_huffman_table(HuffmanTable *table, const uint8_t *counts, const uint8_t *symbols, int total) {
    int code = 0, place = 0;
    memset(table, 0, sizeof *table);
    memcpy(table->symbols, symbols, total);
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->offset[length] = place - code;
        if (code + counts[length - 1] > (1 << length) - (counts[length - 1] > 0)) /* no code may be all ones */
            return UNSUPPORTED;
        for (int i = 0; i < counts[length - 1]; i++, code++, place++) {
            if (length > LOOKUP_BITS)
                continue;
            int symbol = symbols[place], size = symbol & 15, rest = LOOKUP_BITS - length;
            for (int following = 0; following < 1 << rest; following++) {
                int32_t entry = length | symbol << RUN;
                if (size && size <= rest) {
                    int value = sign_extend(following >> (rest - size), size);
                    entry = (length + size) | COMBINED | ((symbol >> 4) + 1) << RUN;
                    entry |= (int32_t)((uint32_t)value << VALUE);
                }
                table->lookup[code << rest | following] = entry;
            }
        }
        table->limit[length] = code << (16 - length);
    }
    table->limit[17] = 1 << 16;
    table->defined = 1;
    return OK;
}

static int read_huffman(JpegHeader *header, const uint8_t *at, int length) {
    while (length > 0) {
        if (length < 17 || (at[0] & ~0x13))
            return UNSUPPORTED;
        int total = 0;
        for (int i = 1; i <= 16; i++)
            total += at[i];
        if (total > 256 || length < 17 + total)
            return UNSUPPORTED;
        for (int i = 0; i < total; i++)
            if (!(at[0] >> 4) && at[17 + i] > 15) /* bits of a DC difference */
                return UNSUPPORTED;
        if (make_huffman_table((at[0] >> 4 ? header->ac : header->dc) + (at[0] & 3), at + 1, at + 17, total))
            return UNSUPPORTED;
        at += 17 + total;
        length -= 17 + total;
    }
    return OK;
}

static int read_quantisation(JpegHeader *header, const uint8_t *at, int length) {
    while (length > 0) {
        int wide = at[0] >> 4, size = wide ? 129 : 65;
        if (length < size || (at[0] & ~0x13))
            return UNSUPPORTED;
        for (int k = 0; k < 64; k++)
            header->quantisation[at[0] & 3][k] = wide ? u16(at + 1 + 2 * k) : at[1 + k];
        header->quantisation_defined[at[0] & 3] = 1;
        at += size;
        length -= size;
    }
    return OK;
}

static int read_frame(JpegHeader *header, const uint8_t *at, int length) {
    if (header->count || length < 6 || at[0] != 8 || (at[5] != 1 && at[5] != 3) || length != 6 + 3 * at[5])
        return UNSUPPORTED;
    header->height = u16(at + 1);
    header->width = u16(at + 3);
    header->count = at[5];
    if (!header->width || !header->height || header->width > MAX_SIDE || header->height > MAX_SIDE)
        return UNSUPPORTED;
    for (int i = 0; i < header->count; i++) {
        const uint8_t *fields = at + 6 + 3 * i;
        Component component = {fields[0], fields[1] >> 4, fields[1] & 15, fields[2], 0, 0};
        if (component.table > 3)
            return UNSUPPORTED;
        header->component[i] = component;
    }
    Component *first = header->component;
    if (header->count == 1) {
        if (!first->h_factor || first->h_factor > 4 || !first->v_factor || first->v_factor > 4)
            return UNSUPPORTED;
        first->h_factor = first->v_factor = 1; /* a single component is not interleaved: one block after another */
        return OK;
    }
    for (int i = 1; i < 3; i++)
        if (first[i].h_factor != 1 || first[i].v_factor != 1)
            return UNSUPPORTED;
    if (first[0].id == first[1].id || first[0].id == first[2].id || first[1].id == first[2].id)
        return UNSUPPORTED;
    int halved = first->h_factor == 2 && (first->v_factor == 1 || first->v_factor == 2) && header->width >= 8;
    return halved || (first->h_factor == 1 && first->v_factor == 1) ? OK : UNSUPPORTED;
}

static int read_scan(JpegHeader *header, const uint8_t *at, int length) {
    if (!header->count || length != 4 + 2 * header->count || at[0] != header->count)
        return UNSUPPORTED;
    for (int i = 0; i < header->count; i++) {
        Component *component = header->component + i;
        component->dc = at[2 + 2 * i] >> 4;
        component->ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != component->id || component->dc > 3 || component->ac > 3)
            return UNSUPPORTED;
        if (!header->dc[component->dc].defined || !header->ac[component->ac].defined)
            return UNSUPPORTED;
        if (!header->quantisation_defined[component->table])
            return UNSUPPORTED;
    }
    at += length - 3;
    if (at[0] != 0 || at[1] != 63 || at[2] != 0)
        return UNSUPPORTED;
    if (header->count == 1 || header->jfif || header->adobe == 1)
        return OK;
    Component *c = header->component;
    return header->adobe < 0 && c[0].id == 1 && c[1].id == 2 && c[2].id == 3 ? OK : UNSUPPORTED;
}

static int starts_with(const uint8_t *body, int length, const char *prefix, int prefix_length) {
    return length >= prefix_length && !memcmp(body, prefix, prefix_length);
}

/* Application segments. Those that Pillow would refuse or read in another way are unsupported. */
static int read_app_segment(JpegHeader *header, int marker, const uint8_t *body, int length) {
    switch (marker) {
    case 0xE0:
        if (starts_with(body, length, "JFIF", 4) && length < 14)
            return UNSUPPORTED;
        header->jfif |= starts_with(body, length, "JFIF\0", 5);
        return OK;
    case 0xE1:
        return starts_with(body, length, "Exif\0\0", 6) ? CHECK_WITH_PILLOW : OK;
    case 0xE2:
        if (starts_with(body, length, "ICC_PROFILE\0", 12))
            return length < 14 ? UNSUPPORTED : OK;
        return starts_with(body, length, "MPF\0", 4) ? UNSUPPORTED : OK;
    case 0xED:
        return starts_with(body, length, "Photoshop 3.0\0", 14) ? CHECK_WITH_PILLOW : OK;
    case 0xEE:
        if (!starts_with(body, length, "Adobe", 5))
            return OK;
        if (length < 12)
            return UNSUPPORTED;
        header->adobe = body[11];
        return OK;
    default:
        return OK;
    }
}

/* One segment of the header: `body` of `length` bytes after `marker`. */
static int parse_segment(JpegHeader *header, int marker, const uint8_t *body, int length) {
    switch (marker) {
    case 0xC0: case 0xC1: /* baseline or extended */
        return read_frame(header, body, length);
    case 0xC4:
        return read_huffman(header, body, length);
    case 0xDA:
        return read_scan(header, body, length);
    case 0xDB:
        return read_quantisation(header, body, length);
    case 0xDD:
        if (length != 2)
            return UNSUPPORTED;
        header->restart = u16(body);
        return OK;
    case 0xFE: /* comment */
        return OK;
    default:
        return marker >= 0xE0 && marker <= 0xEF ? read_app_segment(header, marker, body, length) : UNSUPPORTED;
    }
}

int read_jpeg_header(const uint8_t *data, long length, JpegHeader *header, long *scan) {
    int result = OK;
    memset(header, 0, offsetof(JpegHeader, dc));
    for (int i = 0; i < 4; i++)
        header->dc[i].defined = header->ac[i].defined = 0;
    header->adobe = -1;
    if (length < 4 || data[0] != 0xFF || data[1] != 0xD8)
        return UNSUPPORTED;
    for (long at = 2;;) {
        if (at + 4 > length || data[at] != 0xFF)
            return UNSUPPORTED;
        int marker = data[at + 1], size = u16(data + at + 2) - 2;
        if (size < 0 || at + 4 + size > length)
            return UNSUPPORTED;
        int status = parse_segment(header, marker, data + at + 4, size);
        if (status == UNSUPPORTED)
            return UNSUPPORTED;
        result = status == CHECK_WITH_PILLOW ? CHECK_WITH_PILLOW : result;
        at += 4 + size;
        if (marker == 0xDA) {
            *scan = at;
            return result;
        }
    }
}
