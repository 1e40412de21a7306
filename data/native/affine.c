/* Affine transforms with the results of Pillow to the bit: their definition, and those along one axis.

   Pillow takes a result's pixel from the place (a0 x + a1 y + a2, a3 x + a4 y + a5), x and y counted to the pixels'
   middles, interpolates in double precision and cuts off what follows the point. Here each value is first computed in
   single precision, many at a time. Where that lies within its error of a whole number, so that cutting off could go
   either way, the value is computed again as Pillow does it (about one in a thousand). In uniform regions, where nearly
   all would, the single-precision value is whole and right.

   Shears and translations interpolate along one axis alone; other matrices are in warp.c. */

#include "affine.h"

#include <math.h>

#define TINY 1e-9 /* a fraction this near to 0 or 1 may belong to either of two pixels, by rounding alone */

/* ------------------------------------------------------------------------------------------- the definition of right */

static inline int floor_of(double v) {
    int i = (int)v;
    return i - (v < i);
}

static inline double source_x(const double *a, int x, int y) { return a[0] * (x + 0.5) + a[1] * (y + 0.5) + a[2]; }

static inline double source_y(const double *a, int x, int y) { return a[3] * (x + 0.5) + a[4] * (y + 0.5) + a[5]; }

static inline double cubic(double v1, double v2, double v3, double v4, double d) {
    double p1 = v2, p2 = -v1 + v3, p3 = 2 * (v1 - v2) + v3 - v4, p4 = -v1 + v2 - v3 + v4;
    return p1 + d * (p2 + d * (p3 + d * p4));
}

/* Channel c of what lies at (sx, sy) inside the picture. */
static uint8_t exact(const transform *t, double sx, double sy, int c) {
    sx -= 0.5;
    sy -= 0.5;
    int x = floor_of(sx), y = floor_of(sy), w = t->w;
    double dx = sx - x, dy = sy - y, rows[4], value;
    for (int j = t->bicubic ? 0 : 1; j < (t->bicubic ? 4 : 3); j++) {
        const uint8_t *row = t->in + (size_t)clamp(y + j - 1, t->h) * w * 3 + c;
        double v2 = row[3 * clamp(x, w)], v3 = row[3 * clamp(x + 1, w)];
        rows[j] = t->bicubic ? cubic(row[3 * clamp(x - 1, w)], v2, v3, row[3 * clamp(x + 2, w)], dx)
                             : v2 + (v3 - v2) * dx;
    }
    value = t->bicubic ? cubic(rows[0], rows[1], rows[2], rows[3], dy) : rows[1] + (rows[2] - rows[1]) * dy;
    return value <= 0.0 ? 0 : value >= 255.0 ? 255 : (uint8_t)value;
}

void swin_exact_pixel(const transform *t, int x, int y) {
    double sx = source_x(t->a, x, y), sy = source_y(t->a, x, y);
    if (sx < 0.0 || sx >= t->w || sy < 0.0 || sy >= t->h)
        put_fill(t, x, y);
    else
        for (int c = 0; c < 3; c++)
            pixel_of(t, x, y)[c] = exact(t, sx, sy, c);
}

void swin_settle(const transform *t, const uint8_t *doubt, int y) {
    for (int k = 0; k < 3 * t->w; k += 8) {
        uint64_t any;
        memcpy(&any, doubt + k, 8);
        if (!any)
            continue;
        for (int j = k; j < k + 8; j++)
            if (doubt[j])
                pixel_of(t, 0, y)[j] = exact(t, source_x(t->a, j / 3, y), source_y(t->a, j / 3, y), j % 3);
    }
}

/* ------------------------------------------------------------------------------------------- along one axis */

/* Weights of the four taps at the fraction d between the second and the third. */
static inline void weights(double d, int bicubic, double t[4]) {
    if (bicubic) {
        t[0] = d * (-1 + d * (2 - d));
        t[1] = 1 + d * d * (d - 2);
        t[2] = d * (1 + d * (1 - d));
        t[3] = d * d * (d - 1);
    } else {
        t[0] = t[3] = 0;
        t[1] = 1 - d;
        t[2] = d;
    }
}

/* How a line (a row, or a column) is moved along itself: the result's pixels first … last come from `shift` further on
   and a fraction `d`. Irregular: by rounding, not all of them may. */
typedef struct {
    int first, last, shift, irregular;
    double d;
} move;

static inline double place(const double *a, int i, int line, int vertical) {
    return vertical ? source_y(a, line, i) : source_x(a, i, line);
}

/* `place` grows by one for each i, apart from rounding. */
static move move_along(const double *a, int line, int size, int vertical) {
    double start = place(a, 0, line, vertical) - 0.5;
    move m = {.first = 0, .last = -1};
    if (!(fabs(start) < 1e6) || start >= size || start <= -size)
        return m; /* all from outside */
    int first = start < 0 ? (int)-start : 0, last = start > 0 ? size - 1 - (int)start : size - 1;
    first = first > 1 ? first - 2 : 0;
    last = last + 2 < size ? last + 2 : size - 1;
    while (first < size && place(a, first, line, vertical) < 0.0)
        first++;
    while (last >= first && place(a, last, line, vertical) >= size)
        last--;
    if (last < first)
        return m;
    double from = place(a, first, line, vertical) - 0.5, to = place(a, last, line, vertical) - 0.5;
    int whole = floor_of(from);
    m.first = first;
    m.last = last;
    m.shift = whole - first;
    m.d = from - whole;
    int same = floor_of(to) - last == m.shift;
    int exactly_whole = m.d == 0.0 && to == last + m.shift;
    m.irregular = !same || (!exactly_whole && (m.d < TINY || m.d > 1 - TINY));
    return m;
}

/* The four rows p0 … p3 weighted, n values; the weight of value k is at k * stride of t0, t2, t3. */
static inline __attribute__((always_inline)) void weighted(const uint8_t *restrict p0, const uint8_t *restrict p1,
                                                           const uint8_t *restrict p2, const uint8_t *restrict p3,
                                                           const float *restrict t0, const float *restrict t2,
                                                           const float *restrict t3, int stride, uint8_t *restrict out,
                                                           uint8_t *restrict doubt, int n) {
    for (int k = 0; k < n; k++) {
        int here = p1[k], i0 = p0[k] - here, i2 = p2[k] - here, i3 = p3[k] - here, weighs;
        float t = t2[k * stride];
        float value = (float)here + t0[k * stride] * (float)i0 + t * (float)i2 + t3[k * stride] * (float)i3;
        int fixed = (int)(value * ONE);
        memcpy(&weighs, &t, sizeof t); /* 0 for a fraction of 0, where all is exact */
        out[k] = cut_off(fixed);
        doubt[k] = (uint8_t)(near_whole(fixed, DOUBT_1D) & ((i0 | i2 | i3) != 0) & (weighs != 0));
    }
}

static void weighted_same(const uint8_t *p1, const double t[4], uint8_t *out, uint8_t *doubt, int n) {
    float t0 = (float)t[0], t2 = (float)t[2], t3 = (float)t[3];
    weighted(p1 - 3, p1, p1 + 3, p1 + 6, &t0, &t2, &t3, 0, out, doubt, n);
}

static void weighted_each(const uint8_t *p, size_t stride, const float *t, uint8_t *out, uint8_t *doubt, int n) {
    weighted(p, p + stride, p + 2 * stride, p + 3 * stride, t, t + n, t + 2 * n, 1, out, doubt, n);
}

/* Row y moved by a part of a pixel, by way of `padded`, where its ends are repeated. */
static void move_row(const transform *t, int y, const move *m, uint8_t *padded, uint8_t *doubt) {
    int w = t->w, n = 3 * w;
    const uint8_t *from = t->in + (size_t)y * n;
    for (int x = 0; x < 2; x++) {
        memcpy(padded + 3 * x, from, 3);
        memcpy(padded + 6 + n + 3 * x, from + n - 3, 3);
    }
    memcpy(padded + 6, from, (size_t)n);
    double each[4];
    weights(m->d, t->bicubic, each);
    memset(doubt, 0, (size_t)n + 8);
    weighted_same(padded + 6 + 3 * (m->first + m->shift), each, pixel_of(t, m->first, y), doubt + 3 * m->first,
                  3 * (m->last - m->first + 1));
    swin_settle(t, doubt, y);
}

/* The first row of the matrix is (1, a1, a2), the second (0, 1, 0). */
static int along_rows(const transform *t) {
    int w = t->w, n = 3 * w;
    uint8_t *padded = swin_scratch((size_t)(2 * n) + 128);
    if (!padded)
        return -1;
    for (int y = 0; y < t->h; y++) {
        move m = move_along(t->a, y, w, 0);
        for (int x = 0; x < m.first; x++)
            put_fill(t, x, y);
        for (int x = m.last + 1; x < w; x++)
            put_fill(t, x, y);
        if (m.irregular)
            for (int x = m.first; x <= m.last; x++)
                swin_exact_pixel(t, x, y);
        else if (m.last >= m.first && m.d == 0.0)
            memcpy(pixel_of(t, m.first, y), t->in + (size_t)y * n + 3 * (m.first + m.shift),
                   3 * (size_t)(m.last - m.first + 1));
        else if (m.last >= m.first)
            move_row(t, y, &m, padded, padded + n + 64);
    }
    return 0;
}

/* Row r of `moved` (of h + 3, `stride` bytes apart) holds in column x the source's row r - 1 + moves[x].shift. */
static void move_columns(const transform *t, uint8_t *moved, const move *moves, size_t stride) {
    int w = t->w;
    size_t n = 3 * (size_t)w;
    for (int start = 0, end; start < w; start = end) {
        for (end = start + 1; end < w && moves[end].shift == moves[start].shift; end++)
            ;
        size_t bytes = 3 * (size_t)(end - start);
        for (int r = 0; r < t->h + 3; r++) {
            const uint8_t *from = t->in + (size_t)clamp(r - 1 + moves[start].shift, t->h) * n + 3 * start;
            uint8_t *to = moved + (size_t)r * stride + 3 * start;
            if (bytes > 48 || 3 * (size_t)start + 48 > n)
                memcpy(to, from, bytes);
            else
                for (size_t k = 0; k < bytes; k += 16) /* what is too much is written again by the next run */
                    memcpy(to + k, from + k, 16);
        }
    }
}

/* The first row of the matrix is (1, 0, 0), the second (a3, 1, a5). */
static int along_columns(const transform *t) {
    int w = t->w, h = t->h;
    size_t n = 3 * (size_t)w, stride = n + 64, moved_bytes = (size_t)(h + 3) * stride;
    uint8_t *moved = swin_scratch(moved_bytes + stride + n * 3 * sizeof(float) + sizeof(move) * (size_t)w + 128);
    if (!moved)
        return -1;
    uint8_t *doubt = moved + moved_bytes;
    float *each = (float *)(((uintptr_t)(doubt + stride) + 63) & ~(uintptr_t)63);
    move *moves = (move *)(((uintptr_t)(each + 3 * n) + 15) & ~(uintptr_t)15);
    for (int x = 0; x < w; x++) {
        double of_column[4];
        moves[x] = move_along(t->a, x, h, 1);
        weights(moves[x].d, t->bicubic, of_column);
        for (int c = 0; c < 3; c++) {
            each[3 * x + c] = (float)of_column[0];
            each[n + 3 * x + c] = (float)of_column[2];
            each[2 * n + 3 * x + c] = (float)of_column[3];
        }
    }
    move_columns(t, moved, moves, stride);
    memset(doubt + n, 0, 8);
    for (int y = 0; y < h; y++) {
        weighted_each(moved + (size_t)y * stride, stride, each, pixel_of(t, 0, y), doubt, (int)n);
        swin_settle(t, doubt, y);
    }
    for (int x = 0; x < w; x++)
        for (int y = 0; y < h; y++)
            if (y < moves[x].first || y > moves[x].last)
                put_fill(t, x, y);
            else if (moves[x].irregular)
                swin_exact_pixel(t, x, y);
    return 0;
}

/* ------------------------------------------------------------------------------------------- the nearest pixel */

/* Places are added up step by step, as Pillow does: in 1/65536 of a pixel, or in doubles where the matrix only scales
   or a place has no room in the former. */
static void nearest(const transform *t) {
    const double *a = t->a;
    int doubles = a[1] == 0 && a[3] == 0;
    for (int corner = 0; corner < 4; corner++) {
        int x = corner & 1 ? t->w : 0, y = corner & 2 ? t->h : 0;
        doubles |= !(fabs(x * a[0] + y * a[1] + a[2]) < 32768.0 && fabs(x * a[3] + y * a[4] + a[5]) < 32768.0);
    }
    double unit = doubles ? 1.0 : 65536.0, rounded[6];
    double start[6] = {a[0], a[1], a[2] + a[0] * 0.5 + a[1] * 0.5, a[3], a[4], a[5] + a[3] * 0.5 + a[4] * 0.5};
    if (doubles) {
        start[2] = a[2] + a[1] * 0.5 + a[0] * 0.5;
        start[5] = a[5] + a[4] * 0.5 + a[3] * 0.5;
    }
    for (int i = 0; i < 6; i++)
        rounded[i] = doubles ? start[i] : floor(start[i] * 65536.0 + 0.5);
    double row_x = rounded[2], row_y = rounded[5];
    for (int y = 0; y < t->h; y++, row_x += rounded[1], row_y += rounded[4]) {
        double at_x = row_x, at_y = row_y;
        for (int x = 0; x < t->w; x++, at_x += rounded[0], at_y += rounded[3])
            if (at_x < 0.0 || at_x >= t->w * unit || at_y < 0.0 || at_y >= t->h * unit)
                put_fill(t, x, y);
            else
                memcpy(pixel_of(t, x, y), t->in + 3 * ((size_t)(at_y / unit) * t->w + (size_t)(at_x / unit)), 3);
    }
}

int swin_affine(const uint8_t *in, uint8_t *out, int h, int w, const step *s) {
    const double *a = s->a;
    transform t = {.in = in, .out = out, .h = h, .w = w, .bicubic = s->filter == BICUBIC, .a = a};
    for (int c = 0; c < 3; c++)
        t.fill[c] = (uint8_t)s->fill[c];
    if (s->filter == NEAREST) {
        nearest(&t);
        return 0;
    }
    if (a[0] == 1 && a[3] == 0 && a[4] == 1 && a[5] == 0)
        return along_rows(&t);
    if (a[0] == 1 && a[1] == 0 && a[2] == 0 && a[4] == 1)
        return along_columns(&t);
    return swin_warp(&t);
}
