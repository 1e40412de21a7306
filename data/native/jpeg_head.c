/* What stands before a JPEG's data (ITU-T T.81, annex B): frame, tables, scan. Strict, as jpeg.c says. */

#include <stddef.h>
#include <string.h>

#include "image.h"
#include "jpeg.h"

static int u16(const uint8_t *at) {
    return at[0] << 8 | at[1];
}

static int make_table(Table *table, const uint8_t *counts, const uint8_t *symbols, int total) {
    int code = 0, place = 0;
    memset(table, 0, sizeof *table);
    memcpy(table->symbols, symbols, total);
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->offset[length] = place - code;
        if (code + counts[length - 1] > (1 << length) - (counts[length - 1] > 0)) /* none may be all ones */
            return NOT_FOR_ME;
        for (int i = 0; i < counts[length - 1]; i++, code++, place++) {
            if (length > FAST)
                continue;
            int symbol = symbols[place], size = symbol & 15, rest = FAST - length;
            for (int following = 0; following < 1 << rest; following++) {
                int32_t entry = length | symbol << RUN;
                if (size && size <= rest) {
                    int number = extended(following >> (rest - size), size);
                    entry = (length + size) | PLAIN | ((symbol >> 4) + 1) << RUN | (int32_t)((uint32_t)number << NUMBER);
                }
                table->fast[code << rest | following] = entry;
            }
        }
        table->limit[length] = code << (16 - length);
    }
    table->limit[17] = 1 << 16;
    table->there = 1;
    return OK;
}

static int read_huffman(Head *head, const uint8_t *at, int length) {
    while (length > 0) {
        if (length < 17 || (at[0] & ~0x13))
            return NOT_FOR_ME;
        int total = 0;
        for (int i = 1; i <= 16; i++)
            total += at[i];
        if (total > 256 || length < 17 + total)
            return NOT_FOR_ME;
        for (int i = 0; i < total; i++)
            if (!(at[0] >> 4) && at[17 + i] > 15) /* a difference of so many bits */
                return NOT_FOR_ME;
        if (make_table((at[0] >> 4 ? head->ac : head->dc) + (at[0] & 3), at + 1, at + 17, total))
            return NOT_FOR_ME;
        at += 17 + total;
        length -= 17 + total;
    }
    return OK;
}

static int read_quantisation(Head *head, const uint8_t *at, int length) {
    while (length > 0) {
        int wide = at[0] >> 4, size = wide ? 129 : 65;
        if (length < size || (at[0] & ~0x13))
            return NOT_FOR_ME;
        for (int k = 0; k < 64; k++)
            head->quantisation[at[0] & 3][k] = wide ? u16(at + 1 + 2 * k) : at[1 + k];
        head->quantisation_there[at[0] & 3] = 1;
        at += size;
        length -= size;
    }
    return OK;
}

static int read_frame(Head *head, const uint8_t *at, int length) {
    if (head->count || length < 6 || at[0] != 8 || (at[5] != 1 && at[5] != 3) || length != 6 + 3 * at[5])
        return NOT_FOR_ME;
    head->height = u16(at + 1);
    head->width = u16(at + 3);
    head->count = at[5];
    for (int i = 0; i < head->count; i++) {
        const uint8_t *part = at + 6 + 3 * i;
        Component component = {part[0], part[1] >> 4, part[1] & 15, part[2], 0, 0};
        if (component.table > 3)
            return NOT_FOR_ME;
        head->component[i] = component;
    }
    Component *first = head->component;
    if (head->count == 1) {
        if (!first->across || first->across > 4 || !first->down || first->down > 4)
            return NOT_FOR_ME;
        first->across = first->down = 1; /* alone, a component's blocks come one by one */
        return OK;
    }
    for (int i = 1; i < 3; i++)
        if (first[i].across != 1 || first[i].down != 1)
            return NOT_FOR_ME;
    if (first[0].id == first[1].id || first[0].id == first[2].id || first[1].id == first[2].id)
        return NOT_FOR_ME;
    int halved = first->across == 2 && (first->down == 1 || first->down == 2) && head->width >= 8;
    return halved || (first->across == 1 && first->down == 1) ? OK : NOT_FOR_ME;
}

static int read_scan(Head *head, const uint8_t *at, int length) {
    if (!head->count || length != 4 + 2 * head->count || at[0] != head->count)
        return NOT_FOR_ME;
    for (int i = 0; i < head->count; i++) {
        Component *component = head->component + i;
        component->dc = at[2 + 2 * i] >> 4;
        component->ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != component->id || component->dc > 3 || component->ac > 3)
            return NOT_FOR_ME;
        if (!head->dc[component->dc].there || !head->ac[component->ac].there)
            return NOT_FOR_ME;
        if (!head->quantisation_there[component->table])
            return NOT_FOR_ME;
    }
    at += length - 3;
    if (at[0] != 0 || at[1] != 63 || at[2] != 0)
        return NOT_FOR_ME;
    if (head->count == 1 || head->jfif || head->adobe == 1)
        return OK;
    Component *c = head->component;
    return head->adobe < 0 && c[0].id == 1 && c[1].id == 2 && c[2].id == 3 ? OK : NOT_FOR_ME;
}

/* Everything up to the scan, whose data begin at *scan. */
int read_head(const uint8_t *data, long length, Head *head, long *scan) {
    memset(head, 0, offsetof(Head, dc));
    for (int i = 0; i < 4; i++)
        head->dc[i].there = head->ac[i].there = 0;
    head->adobe = -1;
    if (length < 4 || data[0] != 0xFF || data[1] != 0xD8)
        return NOT_FOR_ME;
    for (long at = 2;;) {
        if (at + 4 > length || data[at] != 0xFF)
            return NOT_FOR_ME;
        int marker = data[at + 1], size = u16(data + at + 2) - 2, failed = 0;
        const uint8_t *body = data + at + 4;
        if (size < 0 || at + 4 + size > length)
            return NOT_FOR_ME;
        at += 4 + size;
        if (marker == 0xC0 || marker == 0xC1)
            failed = read_frame(head, body, size);
        else if (marker == 0xC4)
            failed = read_huffman(head, body, size);
        else if (marker == 0xDB)
            failed = read_quantisation(head, body, size);
        else if (marker == 0xDD && size == 2)
            head->restart = u16(body);
        else if (marker == 0xE0)
            head->jfif |= size >= 14 && !memcmp(body, "JFIF", 5);
        else if (marker == 0xEE && size >= 12 && !memcmp(body, "Adobe", 5))
            head->adobe = body[11];
        else if (marker == 0xDA) {
            *scan = at;
            return read_scan(head, body, size);
        } else if (marker != 0xFE && (marker < 0xE0 || marker > 0xEF))
            return NOT_FOR_ME;
        if (failed)
            return NOT_FOR_ME;
    }
}
