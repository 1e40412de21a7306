// Vectors of 16 floats, and packs, the operands of multiply-adds: part of attention.cpp.
//
// A pack has 32 bits. It is one float (PackF32), or, on processors that multiply pairs of bfloat16, two bfloat16
// neighbours along the dimension over which a product sums (PackBf16).
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
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
inline uvec as_bits(vec x) { return (uvec)x; }
inline vec as_floats(uvec x) { return (vec)x; }
inline vec load(const bf16* p) {
  return as_floats(__builtin_convertvector(*reinterpret_cast<const hvec*>(p), uvec) << 16);
}
// Rounds to the nearest bfloat16, ties to even, in the upper half of each lane.
inline uvec round_to_bf16(vec x) {
  uvec u = as_bits(x), nan = (uvec)(x != x);
  return ((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | (nan & 0x7fc00000);
}
inline void store(bf16* p, vec x) {
  *reinterpret_cast<hvec*>(p) = __builtin_convertvector(round_to_bf16(x) >> 16, hvec);
}
inline vec max(vec a, vec b) { return a > b ? a : b; }
// Lanes of the vectors a and b: lane order[i] of both together is lane i of the result.
template <int... order>
inline vec shuffle(vec a, vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, order...);
#else
  return __builtin_shuffle(a, b, ivec{order...});
#endif
}
// Divides 16 rows of 16 lanes into blocks of half × half, and exchanges each pair of blocks off a diagonal.
template <int half, int... i>
inline void exchange_blocks(vec x[16], std::integer_sequence<int, i...>) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) {
    if (r & half) continue;
    vec above = x[r], below = x[r + half];
    x[r] = shuffle<(i & half ? 16 + i - half : i)...>(above, below);
    x[r + half] = shuffle<(i & half ? 16 + i : i + half)...>(above, below);
  }
}
template <int half>
inline void exchange_blocks(vec x[16]) {
  exchange_blocks<half>(x, std::make_integer_sequence<int, 16>());
}
inline float horizontal_sum(vec x) {
  float lanes[16], sum = 0;
  store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}
// exp(x) for x <= 0, to float32's precision; 0 below -87, where float32 underflows; NaN for NaN.
inline vec exp_nonpositive(vec x) {
  ivec underflow = x < -87.0f;
  vec shifted = x * 1.44269504f + 12582912.0f;  // leaves the nearest integer in the lowest bits
  uvec exponent = as_bits(shifted) << 23;
  vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vec p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 0.166666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return as_floats(((as_bits(p) + exponent) & ~(uvec)underflow) | (uvec)(x != x));
}

// Values become packs of one float: neighbours are separate packs in every direction, so matrices stay as they are.
struct PackF32 {
  static long packs(long n) { return n; }  // packs of n neighbours
  static vec multiply_add(vec sum, float a, vec b) { return sum + a * b; }
  template <typename T> static void load_token(const T* from, long d, float* to) {
    for (long c = 0; c < d; c += 16) store(to + c, load(from + c));
  }
  template <typename T> static void store_token(const float* from, long d, T* to) {
    for (long c = 0; c < d; c += 16) store(to + c, load(from + c));
  }
  static float dot(const float* packs, const float* values, long d) {
    vec sum{};
    for (long c = 0; c < d; c += 16) sum += load(packs + c) * load(values + c);
    return horizontal_sum(sum);
  }
  // values -= factor * packs
  static void subtract_scaled(float* values, const float* packs, float factor, long d) {
    for (long c = 0; c < d; c += 16) store(values + c, load(values + c) - load(packs + c) * factor);
  }
  static const float* pack_tokens(const float* tokens, long, long, float*) { return tokens; }
  static const float* pack_rows(const float* matrix, long, long, float*) { return matrix; }
  static const float* pack_columns(const float* matrix, long, long, float*) { return matrix; }
};

#ifdef __AVX512BF16__
// d is a multiple of 32. Columns of results are in the order 0, 2, … 30, 1, 3, … 31 of each 32, because shifts separate
// the two halves of a pack; store_token restores their order.
struct PackBf16 {
  static long packs(long n) { return (n + 1) / 2; }  // packs of n neighbours
  static vec multiply_add(vec sum, float a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
  static vec even(uvec packs) { return as_floats(packs << 16); }
  static vec odd(uvec packs) { return as_floats(packs & 0xffff0000u); }
  static uvec pair(vec first, vec second) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // 16 firsts, 16 seconds
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (uvec)_mm512_permutexvar_epi16(order, both);
  }
  static void load_token(const bf16* from, long d, float* to) { std::memcpy(to, from, 2 * d); }
  static void store_token(const float* from, long d, bf16* to) {
    for (long c = 0; c < d; c += 32)
      *reinterpret_cast<uvec*>(to + c) = pair(load(from + c), load(from + c + 16));
  }
  static float dot(const float* packs, const float* values, long d) {
    vec sum{};
    for (long c = 0; c < d; c += 32) {
      uvec p = as_bits(load(packs + c / 2));
      sum += even(p) * load(values + c) + odd(p) * load(values + c + 16);
    }
    return horizontal_sum(sum);
  }
  // values -= factor * packs
  static void subtract_scaled(float* values, const float* packs, float factor, long d) {
    for (long c = 0; c < d; c += 32) {
      uvec p = as_bits(load(packs + c / 2));
      store(values + c, load(values + c) - even(p) * factor);
      store(values + c + 16, load(values + c + 16) - odd(p) * factor);
    }
  }
  // Tokens (N, d / 2 packs along d) to packs of two tokens: (packs(N), d).
  static const float* pack_tokens(const float* tokens, long N, long d, float* to) {
    for (long t = 0; t < N; t += 2)
      for (long c = 0; c < d; c += 32) {
        uvec a = as_bits(load(tokens + t * d / 2 + c / 2)), b{};
        if (t + 1 < N) b = as_bits(load(tokens + (t + 1) * d / 2 + c / 2));
        store(to + t / 2 * d + c, as_floats((a & 0xffff) | (b << 16)));
        store(to + t / 2 * d + c + 16, as_floats((a >> 16) | (b & 0xffff0000u)));
      }
    return to;
  }
  // A matrix (N, NP) to packs of two rows: (packs(N), NP).
  static const float* pack_rows(const float* matrix, long N, long NP, float* to) {
    for (long j = 0; j < N; j += 2)
      for (long i = 0; i < NP; i += 16)
        store(to + j / 2 * NP + i,
              as_floats(pair(load(matrix + j * NP + i), j + 1 < N ? load(matrix + (j + 1) * NP + i) : vec{})));
    return to;
  }
  // A matrix (N, NP) to packs of two columns: (N, packs(NP)).
  static const float* pack_columns(const float* matrix, long N, long NP, float* to) {
    for (long j = 0; j < N; j++)
      for (long i = 0; i < NP; i += 16) {
        __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)load(matrix + j * NP + i));
        std::memcpy(to + (j * NP + i) / 2, &half, 32);
      }
    return to;
  }
};
#endif

}  // namespace
