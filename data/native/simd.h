/* Sixteen 32-bit sums at once. Each variant does the same integer arithmetic, so results are equal on all machines. On
   processors without a variant of their own, plain loops are left to the compiler's vectoriser. */

#ifndef SWIN_SIMD_H
#define SWIN_SIMD_H

#include <stdint.h>
#include <string.h>

#define LANES 16

#if defined(__AVX512F__)

#include <immintrin.h>

typedef __m512i Sums16;

static inline Sums16 broadcast(int32_t value) {
    return _mm512_set1_epi32(value);
}

/* sums + 16 bytes × weight */
static inline Sums16 add_weighted(Sums16 sums, const uint8_t *bytes, int32_t weight) {
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    return _mm512_add_epi32(sums, _mm512_mullo_epi32(wide, _mm512_set1_epi32(weight)));
}

/* sums / 2^bits, rounded down and clipped to 0 … 255, as 16 bytes */
static inline void store_clipped(uint8_t *out, Sums16 sums, int bits) {
    sums = _mm512_max_epi32(_mm512_srai_epi32(sums, bits), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(sums));
}

#elif defined(__AVX2__)

#include <immintrin.h>

typedef struct {
    __m256i low, high;
} Sums16;

static inline Sums16 broadcast(int32_t value) {
    Sums16 sums = {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
    return sums;
}

static inline Sums16 add_weighted(Sums16 sums, const uint8_t *bytes, int32_t weight) {
    __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
    __m256i high = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + 8)));
    __m256i factor = _mm256_set1_epi32(weight);
    sums.low = _mm256_add_epi32(sums.low, _mm256_mullo_epi32(low, factor));
    sums.high = _mm256_add_epi32(sums.high, _mm256_mullo_epi32(high, factor));
    return sums;
}

static inline void store_clipped(uint8_t *out, Sums16 sums, int bits) {
    __m256i words = _mm256_packus_epi32(_mm256_srai_epi32(sums.low, bits), _mm256_srai_epi32(sums.high, bits));
    words = _mm256_permute4x64_epi64(words, 0xD8); /* packing works within 128-bit halves: restore the order */
    __m128i first = _mm256_castsi256_si128(words), second = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(first, second));
}

#else

typedef struct {
    int32_t lane[LANES];
} Sums16;

static inline Sums16 broadcast(int32_t value) {
    Sums16 sums;
    for (int j = 0; j < LANES; j++)
        sums.lane[j] = value;
    return sums;
}

static inline Sums16 add_weighted(Sums16 sums, const uint8_t *bytes, int32_t weight) {
    for (int j = 0; j < LANES; j++)
        sums.lane[j] += bytes[j] * weight;
    return sums;
}

static inline void store_clipped(uint8_t *out, Sums16 sums, int bits) {
    for (int j = 0; j < LANES; j++) {
        int32_t value = sums.lane[j] >> bits;
        out[j] = value < 0 ? 0 : value > 255 ? 255 : value;
    }
}

#endif

#endif
