/* Affine transforms, bit-equal to Pillow: the double-precision definition, and the transforms along one axis.

   For the output pixel with centre (x, y), Pillow samples the source at (a0 x + a1 y + a2, a3 x + a4 y + a5),
   interpolates in double precision and truncates. Here each value is first computed in single precision, which
   vectorises. If it is within its error bound of an integer, truncation could go either way, so the value is recomputed
   as Pillow does it (about one in a thousand). In uniform regions the single-precision value is exactly the integer and
   needs no second computation.

   Shears and translations interpolate along one axis only. All other matrices are handled in affine_2d.c. */

#include "affine.h"

#include <math.h>

#define TINY 1e-9 /* if a fraction is this near to 0 or 1, rounding decides which of two pixels it belongs to */

/* --------------------------------------------------------------------------------- the double-precision definition */

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

/* Channel c of the source at (sx, sy), a position inside the image. */
static uint8_t exact(const AffineOp *t, double sx, double sy, int c) {
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

void exact_pixel(const AffineOp *t, int x, int y) {
    double sx = source_x(t->a, x, y), sy = source_y(t->a, x, y);
    if (!(sx >= 0.0 && sx < t->w && sy >= 0.0 && sy < t->h)) /* also NaN */
        put_fill(t, x, y);
    else
        for (int c = 0; c < 3; c++)
            pixel_of(t, x, y)[c] = exact(t, sx, sy, c);
}

void recompute_inexact(const AffineOp *t, const uint8_t *inexact, int y) {
    for (int k = 0; k < 3 * t->w; k += 8) {
        uint64_t any;
        memcpy(&any, inexact + k, 8);
        if (!any)
            continue;
        for (int j = k; j < k + 8; j++)
            if (inexact[j])
                pixel_of(t, 0, y)[j] = exact(t, source_x(t->a, j / 3, y), source_y(t->a, j / 3, y), j % 3);
    }
}

/* ------------------------------------------------------------------------------------------- along one axis */

/* Weights of the four taps at a position d of the way from the second tap to the third. */
static inline void tap_weights(double d, int bicubic, double t[4]) {
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

/* How a line (a row or a column) moves along itself: output pixel i in first … last is sampled at i + shift + d.
   irregular: because of rounding this may not hold for all of them, so each pixel is computed in double precision. */
typedef struct {
    int first, last, shift, irregular;
    double d;
} LineShift;

static inline double source_at(const double *a, int i, int line, int vertical) {
    return vertical ? source_y(a, line, i) : source_x(a, i, line);
}

/* `source_at` grows by one for each i, apart from rounding. */
static LineShift line_shift(const double *a, int line, int size, int vertical) {
    double start = source_at(a, 0, line, vertical) - 0.5;
    LineShift m = {.first = 0, .last = -1};
    if (!(fabs(start) < 1e6) || start >= size || start <= -size)
        return m; /* all of the line is outside the source */
    int first = start < 0 ? (int)-start : 0, last = start > 0 ? size - 1 - (int)start : size - 1;
    first = first > 1 ? first - 2 : 0;
    last = last + 2 < size ? last + 2 : size - 1;
    while (first < size && source_at(a, first, line, vertical) < 0.0)
        first++;
    while (last >= first && source_at(a, last, line, vertical) >= size)
        last--;
    if (last < first)
        return m;
    double from = source_at(a, first, line, vertical) - 0.5, to = source_at(a, last, line, vertical) - 0.5;
    int base = floor_of(from);
    m.first = first;
    m.last = last;
    m.shift = base - first;
    m.d = from - base;
    int same = floor_of(to) - last == m.shift;
    int exact_integer = m.d == 0.0 && to == last + m.shift;
    m.irregular = !same || (!exact_integer && (m.d < TINY || m.d > 1 - TINY));
    return m;
}

/* Weighted sums of the four inputs p0 … p3, n values. The weights of value k are at k * stride of t0, t2 and t3. */
static inline __attribute__((always_inline)) void weigh(const uint8_t *restrict p0, const uint8_t *restrict p1,
                                                        const uint8_t *restrict p2, const uint8_t *restrict p3,
                                                        const float *restrict t0, const float *restrict t2,
                                                        const float *restrict t3, int stride, uint8_t *restrict out,
                                                        uint8_t *restrict inexact, int n) {
    for (int k = 0; k < n; k++) {
        int centre = p1[k], i0 = p0[k] - centre, i2 = p2[k] - centre, i3 = p3[k] - centre, weight_bits;
        float t = t2[k * stride];
        float value = (float)centre + t0[k * stride] * (float)i0 + t * (float)i2 + t3[k * stride] * (float)i3;
        int fixed = (int)(value * FIXED_ONE);
        memcpy(&weight_bits, &t, sizeof t); /* all bits are 0 if the fraction is 0, where the value is exact */
        out[k] = truncate_u8(fixed);
        inexact[k] = (uint8_t)(near_integer(fixed, ERROR_1D) & ((i0 | i2 | i3) != 0) & (weight_bits != 0));
    }
}

static void weigh_row(const uint8_t *p1, const double t[4], uint8_t *out, uint8_t *inexact, int n) {
    float t0 = (float)t[0], t2 = (float)t[2], t3 = (float)t[3];
    weigh(p1 - 3, p1, p1 + 3, p1 + 6, &t0, &t2, &t3, 0, out, inexact, n);
}

static void weigh_columns(const uint8_t *p, size_t stride, const float *t, uint8_t *out, uint8_t *inexact, int n) {
    weigh(p, p + stride, p + 2 * stride, p + 3 * stride, t, t + n, t + 2 * n, 1, out, inexact, n);
}

/* Shifts row y by a fraction of a pixel. `padded` holds the row with its end pixels repeated. */
static void shift_row(const AffineOp *t, int y, const LineShift *m, uint8_t *padded, uint8_t *inexact) {
    int w = t->w, n = 3 * w;
    const uint8_t *from = t->in + (size_t)y * n;
    for (int x = 0; x < 2; x++) {
        memcpy(padded + 3 * x, from, 3);
        memcpy(padded + 6 + n + 3 * x, from + n - 3, 3);
    }
    memcpy(padded + 6, from, (size_t)n);
    double taps[4];
    tap_weights(m->d, t->bicubic, taps);
    memset(inexact, 0, (size_t)n + 8);
    weigh_row(padded + 6 + 3 * (m->first + m->shift), taps, pixel_of(t, m->first, y), inexact + 3 * m->first,
                  3 * (m->last - m->first + 1));
    recompute_inexact(t, inexact, y);
}

/* For matrices (1, a1, a2, 0, 1, 0). */
static int shift_rows(const AffineOp *t) {
    int w = t->w, n = 3 * w;
    uint8_t *padded = scratch_buffer((size_t)(2 * n) + 128);
    if (!padded)
        return -1;
    for (int y = 0; y < t->h; y++) {
        LineShift m = line_shift(t->a, y, w, 0);
        for (int x = 0; x < m.first; x++)
            put_fill(t, x, y);
        for (int x = m.last + 1; x < w; x++)
            put_fill(t, x, y);
        if (m.irregular)
            for (int x = m.first; x <= m.last; x++)
                exact_pixel(t, x, y);
        else if (m.last >= m.first && m.d == 0.0)
            memcpy(pixel_of(t, m.first, y), t->in + (size_t)y * n + 3 * (m.first + m.shift),
                   3 * (size_t)(m.last - m.first + 1));
        else if (m.last >= m.first)
            shift_row(t, y, &m, padded, padded + n + 64);
    }
    return 0;
}

/* Fills `gathered` (h + 3 rows, `stride` bytes apart): row r of column x is the source's row r - 1 + shifts[x].shift. */
static void gather_columns(const AffineOp *t, uint8_t *gathered, const LineShift *shifts, size_t stride) {
    int w = t->w;
    size_t n = 3 * (size_t)w;
    for (int start = 0, end; start < w; start = end) {
        for (end = start + 1; end < w && shifts[end].shift == shifts[start].shift; end++)
            ;
        size_t bytes = 3 * (size_t)(end - start);
        for (int r = 0; r < t->h + 3; r++) {
            const uint8_t *from = t->in + (size_t)clamp(r - 1 + shifts[start].shift, t->h) * n + 3 * start;
            uint8_t *to = gathered + (size_t)r * stride + 3 * start;
            if (bytes > 48 || 3 * (size_t)start + 48 > n)
                memcpy(to, from, bytes);
            else
                for (size_t k = 0; k < bytes; k += 16) /* bytes past the end are overwritten by the next run */
                    memcpy(to + k, from + k, 16);
        }
    }
}

/* For matrices (1, 0, 0, a3, 1, a5). */
static int shift_columns(const AffineOp *t) {
    int w = t->w, h = t->h;
    size_t n = 3 * (size_t)w, stride = n + 64, gathered_bytes = (size_t)(h + 3) * stride;
    size_t table_bytes = n * 3 * sizeof(float) + sizeof(LineShift) * (size_t)w;
    uint8_t *gathered = scratch_buffer(gathered_bytes + stride + table_bytes + 128);
    if (!gathered)
        return -1;
    uint8_t *inexact = gathered + gathered_bytes;
    float *taps = (float *)(((uintptr_t)(inexact + stride) + 63) & ~(uintptr_t)63);
    LineShift *shifts = (LineShift *)(((uintptr_t)(taps + 3 * n) + 15) & ~(uintptr_t)15);
    for (int x = 0; x < w; x++) {
        double of_column[4];
        shifts[x] = line_shift(t->a, x, h, 1);
        tap_weights(shifts[x].d, t->bicubic, of_column);
        for (int c = 0; c < 3; c++) {
            taps[3 * x + c] = (float)of_column[0];
            taps[n + 3 * x + c] = (float)of_column[2];
            taps[2 * n + 3 * x + c] = (float)of_column[3];
        }
    }
    gather_columns(t, gathered, shifts, stride);
    memset(inexact + n, 0, 8);
    for (int y = 0; y < h; y++) {
        weigh_columns(gathered + (size_t)y * stride, stride, taps, pixel_of(t, 0, y), inexact, (int)n);
        recompute_inexact(t, inexact, y);
    }
    for (int x = 0; x < w; x++)
        for (int y = 0; y < h; y++)
            if (y < shifts[x].first || y > shifts[x].last)
                put_fill(t, x, y);
            else if (shifts[x].irregular)
                exact_pixel(t, x, y);
    return 0;
}

/* ------------------------------------------------------------------------------------------- the nearest pixel */

/* Positions are accumulated pixel by pixel, as Pillow does: in fixed point with 16 fractional bits, or in doubles if
   the matrix only scales or a position does not fit into the fixed-point range. */
static void nearest(const AffineOp *t) {
    const double *a = t->a;
    int use_double = a[1] == 0 && a[3] == 0;
    for (int corner = 0; corner < 4; corner++) {
        int x = corner & 1 ? t->w : 0, y = corner & 2 ? t->h : 0;
        use_double |= !(fabs(x * a[0] + y * a[1] + a[2]) < 32768.0 && fabs(x * a[3] + y * a[4] + a[5]) < 32768.0);
    }
    double unit = use_double ? 1.0 : 65536.0, rounded[6];
    double start[6] = {a[0], a[1], a[2] + a[0] * 0.5 + a[1] * 0.5, a[3], a[4], a[5] + a[3] * 0.5 + a[4] * 0.5};
    if (use_double) {
        start[2] = a[2] + a[1] * 0.5 + a[0] * 0.5;
        start[5] = a[5] + a[4] * 0.5 + a[3] * 0.5;
    }
    for (int i = 0; i < 6; i++)
        rounded[i] = use_double ? start[i] : floor(start[i] * 65536.0 + 0.5);
    double row_x = rounded[2], row_y = rounded[5];
    for (int y = 0; y < t->h; y++, row_x += rounded[1], row_y += rounded[4]) {
        double at_x = row_x, at_y = row_y;
        for (int x = 0; x < t->w; x++, at_x += rounded[0], at_y += rounded[3])
            if (!(at_x >= 0.0 && at_x < t->w * unit && at_y >= 0.0 && at_y < t->h * unit)) /* also NaN */
                put_fill(t, x, y);
            else
                memcpy(pixel_of(t, x, y), t->in + 3 * ((size_t)(at_y / unit) * t->w + (size_t)(at_x / unit)), 3);
    }
}

int swin_affine(const uint8_t *in, uint8_t *out, int h, int w, const OpRecord *s) {
    const double *a = s->a;
    AffineOp t = {.in = in, .out = out, .h = h, .w = w, .bicubic = s->filter == BICUBIC, .a = a};
    for (int c = 0; c < 3; c++)
        t.fill[c] = (uint8_t)s->fill[c];
    if (s->filter == NEAREST) {
        nearest(&t);
        return 0;
    }
    if (a[0] == 1 && a[3] == 0 && a[4] == 1 && a[5] == 0)
        return shift_rows(&t);
    if (a[0] == 1 && a[1] == 0 && a[2] == 0 && a[4] == 1)
        return shift_columns(&t);
    return affine_2d(&t);
}
