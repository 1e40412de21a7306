// Vectors, and how values become the words that products are made of: part of native.cpp, which says the rest.
//
// A word is a float (`Floats`), or, where the processor multiplies pairs of bfloat16 (`Pairs`), two neighbours in the
// direction over which a product sums.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2), may_alias));
struct bf16 { uint16_t bits; };

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline uvec bits(vec x) { return (uvec)x; }
inline vec floats(uvec x) { return (vec)x; }
inline vec load(const bf16* p) {
  return floats(__builtin_convertvector(*reinterpret_cast<const hvec*>(p), uvec) << 16);
}
// The nearest bfloat16, ties to even, in the upper half of each lane.
inline uvec rounded(vec x) {
  uvec u = bits(x), nan = (uvec)(x != x);
  return ((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | (nan & 0x7fc00000);
}
inline void store(bf16* p, vec x) { *reinterpret_cast<hvec*>(p) = __builtin_convertvector(rounded(x) >> 16, hvec); }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float total(vec x) {
  float lanes[16], sum = 0;
  store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}
// exp(x) for x <= 0, to float32's precision; 0 below -87, where float32 runs out; NaN of NaN.
inline vec exp_of_negative(vec x) {
  ivec vanishes = x < -87.0f;
  vec shifted = x * 1.44269504f + 12582912.0f;  // the nearest integer stands in the lowest bits
  uvec exponent = bits(shifted) << 23;
  vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vec p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 0.166666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return floats(((bits(p) + exponent) & ~(uvec)vanishes) | (uvec)(x != x));
}

// How values become words, and what a word times a word is.
struct Floats {
  static long width(long d) { return d; }  // words of a token
  static long steps(long n) { return n; }  // words of n neighbours
  static vec add_product(vec sum, float a, vec b) { return sum + a * b; }
  template <typename T> static void fetch(const T* from, long d, float* to) {
    for (long c = 0; c < d; c += 16) store(to + c, load(from + c));
  }
  template <typename T> static void emit(const float* from, long d, T* to) {
    for (long c = 0; c < d; c += 16) store(to + c, load(from + c));
  }
  static float dot(const float* words, const float* values, long d) {
    vec sum{};
    for (long c = 0; c < d; c += 16) sum += load(words + c) * load(values + c);
    return total(sum);
  }
  // values -= factor * words
  static void subtract(float* values, const float* words, float factor, long d) {
    for (long c = 0; c < d; c += 16) store(values + c, load(values + c) - load(words + c) * factor);
  }
  // Matrices as they are: neighbours are single words in every direction.
  static const float* down(const float* tokens, long, long, float*) { return tokens; }
  static const float* across(const float* matrix, long, long, float*) { return matrix; }
  static const float* rows(const float* matrix, long, long, float*) { return matrix; }
  static long row_width(long NP) { return NP; }
};

#ifdef __AVX512BF16__
// d is a multiple of 32. Columns of results stand in the order 0, 2, … 30, 1, 3, … 31 of each 32: pairs come apart by
// shifts.
struct Pairs {
  static long width(long d) { return d / 2; }
  static long steps(long n) { return (n + 1) / 2; }
  static vec add_product(vec sum, float a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
  static vec even(uvec words) { return floats(words << 16); }
  static vec odd(uvec words) { return floats(words & 0xffff0000u); }
  static uvec pair(vec first, vec second) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // 16 firsts, 16 seconds
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (uvec)_mm512_permutexvar_epi16(order, both);
  }
  static void fetch(const bf16* from, long d, float* to) { std::memcpy(to, from, 2 * d); }
  static void emit(const float* from, long d, bf16* to) {
    for (long c = 0; c < d; c += 32)
      *reinterpret_cast<uvec*>(to + c) = pair(load(from + c), load(from + c + 16));
  }
  static float dot(const float* words, const float* values, long d) {
    vec sum{};
    for (long c = 0; c < d; c += 32) {
      uvec w = bits(load(words + c / 2));
      sum += even(w) * load(values + c) + odd(w) * load(values + c + 16);
    }
    return total(sum);
  }
  static void subtract(float* values, const float* words, float factor, long d) {
    for (long c = 0; c < d; c += 32) {
      uvec w = bits(load(words + c / 2));
      store(values + c, load(values + c) - even(w) * factor);
      store(values + c + 16, load(values + c + 16) - odd(w) * factor);
    }
  }
  // Tokens (N, d / 2 words) with two tokens in a word: (steps(N), d).
  static const float* down(const float* tokens, long N, long d, float* to) {
    for (long t = 0; t < N; t += 2)
      for (long c = 0; c < d; c += 32) {
        uvec a = bits(load(tokens + t * d / 2 + c / 2)), b{};
        if (t + 1 < N) b = bits(load(tokens + (t + 1) * d / 2 + c / 2));
        store(to + t / 2 * d + c, floats((a & 0xffff) | (b << 16)));
        store(to + t / 2 * d + c + 16, floats((a >> 16) | (b & 0xffff0000u)));
      }
    return to;
  }
  // A matrix (N, NP) with two rows in a word: (steps(N), NP).
  static const float* across(const float* matrix, long N, long NP, float* to) {
    for (long j = 0; j < N; j += 2)
      for (long i = 0; i < NP; i += 16)
        store(to + j / 2 * NP + i,
              floats(pair(load(matrix + j * NP + i), j + 1 < N ? load(matrix + (j + 1) * NP + i) : vec{})));
    return to;
  }
  // A matrix (N, NP) with two columns in a word: (N, NP / 2).
  static const float* rows(const float* matrix, long N, long NP, float* to) {
    for (long j = 0; j < N; j++)
      for (long i = 0; i < NP; i += 16) {
        __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)load(matrix + j * NP + i));
        std::memcpy(to + (j * NP + i) / 2, &half, 32);
      }
    return to;
  }
  static long row_width(long NP) { return NP / 2; }
};
#endif

}  // namespace
