/* Sixteen 32-bit sums at once. The same whole-number arithmetic in each variant, so the same results on each machine;
   where there is no variant for the processor, the compiler makes of the loops what it can. */

#ifndef SWIN_LANES_H
#define SWIN_LANES_H

#include <stdint.h>
#include <string.h>

#define LANES 16

#if defined(__AVX512F__)

#include <immintrin.h>

typedef __m512i Sums;

static inline Sums all(int32_t value) {
    return _mm512_set1_epi32(value);
}

/* sums + 16 bytes × weight */
static inline Sums add_weighted(Sums sums, const uint8_t *bytes, int32_t weight) {
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    return _mm512_add_epi32(sums, _mm512_mullo_epi32(wide, _mm512_set1_epi32(weight)));
}

/* sums / 2^bits, rounded down and brought into 0 … 255, as 16 bytes */
static inline void store_clipped(uint8_t *out, Sums sums, int bits) {
    sums = _mm512_max_epi32(_mm512_srai_epi32(sums, bits), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(sums));
}

#elif defined(__AVX2__)

#include <immintrin.h>

typedef struct {
    __m256i low, high;
} Sums;

static inline Sums all(int32_t value) {
    Sums sums = {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
    return sums;
}

static inline Sums add_weighted(Sums sums, const uint8_t *bytes, int32_t weight) {
    __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
    __m256i high = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + 8)));
    __m256i factor = _mm256_set1_epi32(weight);
    sums.low = _mm256_add_epi32(sums.low, _mm256_mullo_epi32(low, factor));
    sums.high = _mm256_add_epi32(sums.high, _mm256_mullo_epi32(high, factor));
    return sums;
}

static inline void store_clipped(uint8_t *out, Sums sums, int bits) {
    __m256i words = _mm256_packus_epi32(_mm256_srai_epi32(sums.low, bits), _mm256_srai_epi32(sums.high, bits));
    words = _mm256_permute4x64_epi64(words, 0xD8); /* packing works within halves: put them in order */
    __m128i first = _mm256_castsi256_si128(words), second = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(first, second));
}

#else

typedef struct {
    int32_t lane[LANES];
} Sums;

static inline Sums all(int32_t value) {
    Sums sums;
    for (int j = 0; j < LANES; j++)
        sums.lane[j] = value;
    return sums;
}

static inline Sums add_weighted(Sums sums, const uint8_t *bytes, int32_t weight) {
    for (int j = 0; j < LANES; j++)
        sums.lane[j] += bytes[j] * weight;
    return sums;
}

static inline void store_clipped(uint8_t *out, Sums sums, int bits) {
    for (int j = 0; j < LANES; j++) {
        int32_t value = sums.lane[j] >> bits;
        out[j] = value < 0 ? 0 : value > 255 ? 255 : value;
    }
}

#endif

#endif
