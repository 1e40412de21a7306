// Window attention on a CPU, forward and backward; native.py says what is computed, native_build.py compiles this.
//
// A thread takes a window at a time and keeps all of it in its caches: tokens are read from the unrolled projection
// (B, H, W, 3, nH, d) where the shift finds them, and what a head says is written where its token lies. Scores are kept
// transposed, keys down and queries across, so that the softmax runs down the columns and no vector is summed across.
//
// Shapes as in native.py. NP is N up to whole vectors of 16.
#include "packs.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace {

struct Shape {  // as native.py passes it
  long B, H, W, heads, d, window, down, right;
  long rows() const { return (H + window - 1) / window; }
  long columns() const { return (W + window - 1) / window; }
  long N() const { return window * window; }
  long NP() const { return (N() + 15) / 16 * 16; }
  long C() const { return heads * d; }
  long windows() const { return B * rows() * columns(); }
};

// c (R, 16 L) = a (R, steps) b (steps, 16 L); a's word for row r and step k is a[r * row + k * step].
template <typename Words, int R, int L>
inline void tile(const float* a, long row, long step, const float* b, long ldb, float* c, long ldc, long steps) {
  vec sum[R][L];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) sum[r][l] = vec{};
  for (long k = 0; k < steps; k++) {
    vec across[L];
    for (int l = 0; l < L; l++) across[l] = load(b + k * ldb + 16 * l);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int l = 0; l < L; l++) sum[r][l] = Words::add_product(sum[r][l], a[r * row + k * step], across[l]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) store(c + r * ldc + 16 * l, sum[r][l]);
}

// c (M, columns) = a b, rows at most 8 at a time and as evenly as can be; columns are a multiple of 16.
template <typename Words, int L>
void stripes(long M, const float* a, long row, long step, const float* b, long ldb, float* c, long ldc, long steps) {
  long blocks = (M + 7) / 8;
  for (long n = 0, i = 0; n < blocks; n++) {
    long R = M / blocks + (n < M % blocks);
    const float* at = a + i * row;
    float* to = c + i * ldc;
    switch (R) {
      case 8: tile<Words, 8, L>(at, row, step, b, ldb, to, ldc, steps); break;
      case 7: tile<Words, 7, L>(at, row, step, b, ldb, to, ldc, steps); break;
      case 6: tile<Words, 6, L>(at, row, step, b, ldb, to, ldc, steps); break;
      case 5: tile<Words, 5, L>(at, row, step, b, ldb, to, ldc, steps); break;
      case 4: tile<Words, 4, L>(at, row, step, b, ldb, to, ldc, steps); break;
      case 3: tile<Words, 3, L>(at, row, step, b, ldb, to, ldc, steps); break;
      case 2: tile<Words, 2, L>(at, row, step, b, ldb, to, ldc, steps); break;
      default: tile<Words, 1, L>(at, row, step, b, ldb, to, ldc, steps);
    }
    i += R;
  }
}
template <typename Words>
void product(long M, long columns, const float* a, long row, long step, const float* b, long ldb, float* c, long ldc,
             long steps) {
  long j = 0;
  for (; j + 32 <= columns; j += 32) stripes<Words, 2>(M, a, row, step, b + j, ldb, c + j, ldc, steps);
  if (j < columns) stripes<Words, 1>(M, a, row, step, b + j, ldb, c + j, ldc, steps);
}

// Words of tokens (NP, width) to (width, NP).
void transpose(const float* from, long width, float* to, long NP) {
  for (long t = 0; t < NP; t += 16)
    for (long w = 0; w < width; w += 16) {
      vec x[16], y[16];
      for (int r = 0; r < 16; r++) x[r] = load(from + (t + r) * width + w);
#pragma GCC unroll 4
      for (int half = 8; half; half /= 2) {  // exchanges the blocks off the diagonal, then within each block
        ivec low, high;
        for (int i = 0; i < 16; i++) {
          low[i] = i & half ? 16 + i - half : i;
          high[i] = i & half ? 16 + i : i + half;
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
          y[r] = r & half ? __builtin_shuffle(x[r - half], x[r], high) : __builtin_shuffle(x[r], x[r + half], low);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) x[r] = y[r];
      }
      for (int r = 0; r < 16; r++) store(to + (w + r) * NP + t, x[r]);
    }
}

// What a thread needs for a window: where its tokens lie, whom each may see, and room for one head's matrices.
struct Room {
  const Shape& s;
  float *q, *k, *v, *g, *across_lanes, *packed, *factors, *out, *p, *ds, *mask, *by_query, *by_key, *memory;
  long* place;   // (N,) of a token in the maps of the batch; -1 where there is only padding
  int* region;   // (N,)
  bool masked;

  explicit Room(const Shape& shape) : s(shape) {
    long N = s.N(), NP = s.NP(), tokens = NP * s.d, matrix = NP * NP;
    long size = 7 * tokens + 4 * matrix + 2 * NP;
    memory = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
    std::memset(memory, 0, size * sizeof(float));  // tokens beyond N stay zero
    float* next = memory;
    auto take = [&](long n) { float* mine = next; next += n; return mine; };
    q = take(tokens), k = take(tokens), v = take(tokens), g = take(tokens);
    across_lanes = take(tokens), packed = take(tokens), out = take(tokens);
    p = take(matrix), ds = take(matrix), mask = take(matrix), factors = take(matrix);
    by_query = take(NP), by_key = take(NP);
    place = static_cast<long*>(std::malloc(N * sizeof(long)));
    region = static_cast<int*>(std::malloc(N * sizeof(int)));
  }
  ~Room() { std::free(memory), std::free(place), std::free(region); }

  // Regions as models/ops/window.py numbers them: 1 for what the shift brought from the other side, 2 for padding.
  void enter(long window) {
    long in_image = window % (s.rows() * s.columns()), image = window / (s.rows() * s.columns());
    long top = in_image / s.columns() * s.window, left = in_image % s.columns() * s.window;
    masked = false;
    for (long t = 0; t < s.N(); t++) {
      long y = (top + t / s.window + s.down) % (s.rows() * s.window);
      long x = (left + t % s.window + s.right) % (s.columns() * s.window);
      region[t] = 3 * (y >= s.H ? 2 : y < s.down) + (x >= s.W ? 2 : x < s.right);
      place[t] = y < s.H && x < s.W ? (image * s.H + y) * s.W + x : -1;
      masked |= region[t] != region[0];
    }
    if (!masked) return;
    for (long j = 0; j < s.N(); j++)
      for (long i = 0; i < s.N(); i++) mask[j * s.NP() + i] = region[i] == region[j] ? 0.f : -100.f;
  }
};

template <typename Words, typename T>
void fetch(const Room& m, const T* from, long stride, float* to) {
  long width = Words::width(m.s.d);
  for (long t = 0; t < m.s.N(); t++) {
    if (m.place[t] >= 0) Words::fetch(from + m.place[t] * stride, m.s.d, to + t * width);
    else std::memset(to + t * width, 0, width * sizeof(float));
  }
}
template <typename Words, typename T>
void emit(const Room& m, T* to, long stride) {
  for (long t = 0; t < m.s.N(); t++)
    if (m.place[t] >= 0) Words::emit(m.out + t * m.s.d, m.s.d, to + m.place[t] * stride);
}

// by[t] = factor over the length of token t.
template <typename Words>
void inverse_lengths(const Room& m, const float* words, float factor, float* by) {
  long d = m.s.d;
  for (long t = 0; t < m.s.N(); t++) {
    float* values = m.out;
    std::fill(values, values + d, 0.f);
    Words::subtract(values, words + t * Words::width(d), -1.f, d);
    by[t] = factor / std::max(std::sqrt(Words::dot(words + t * Words::width(d), values, d)), 1e-12f);
  }
}

// m.p (N, NP), keys down and queries across: SoftMax(q kᵀ · by_query · by_key + bias + mask).
template <typename Words, typename T>
void probabilities(Room& m, const T* qkv, long head, const float* bias, float scale, bool cosine) {
  long N = m.s.N(), NP = m.s.NP(), d = m.s.d, C = m.s.C(), width = Words::width(d);
  fetch<Words>(m, qkv + head * d, 3 * C, m.q);
  fetch<Words>(m, qkv + C + head * d, 3 * C, m.k);
  fetch<Words>(m, qkv + 2 * C + head * d, 3 * C, m.v);
  std::fill(m.by_query, m.by_query + NP, scale);
  std::fill(m.by_key, m.by_key + N, 1.f);
  if (cosine) inverse_lengths<Words>(m, m.q, scale, m.by_query), inverse_lengths<Words>(m, m.k, 1.f, m.by_key);
  transpose(m.q, width, m.across_lanes, NP);
  product<Words>(N, NP, m.k, width, 1, m.across_lanes, NP, m.p, NP, width);
  for (long i = 0; i < NP; i += 16) {
    vec by_query = load(m.by_query + i), most = vec{} - 3e38f, sum{};
    for (long j = 0; j < N; j++) {
      vec x = load(m.p + j * NP + i) * (by_query * m.by_key[j]) + load(bias + j * NP + i);
      if (m.masked) x += load(m.mask + j * NP + i);
      store(m.p + j * NP + i, x);
      most = larger(most, x);
    }
    for (long j = 0; j < N; j++) {
      vec x = exp_of_negative(load(m.p + j * NP + i) - most);
      store(m.p + j * NP + i, x);
      sum += x;
    }
    vec share = 1.f / sum;
    for (long j = 0; j < N; j++) store(m.p + j * NP + i, load(m.p + j * NP + i) * share);
  }
}

template <typename Words, typename T>
void forward(const Shape& s, const T* qkv, const float* bias, const float* scales, bool cosine, T* out, int threads) {
  long N = s.N(), NP = s.NP(), d = s.d;
#pragma omp parallel num_threads(threads)
  {
    Room m(s);
#pragma omp for schedule(static)
    for (long w = 0; w < s.windows(); w++) {
      m.enter(w);
      for (long h = 0; h < s.heads; h++) {
        probabilities<Words>(m, qkv, h, bias + h * N * NP, scales[h], cosine);
        const float* v = Words::down(m.v, N, d, m.packed);
        product<Words>(N, d, Words::across(m.p, N, NP, m.factors), 1, NP, v, d, m.out, d, Words::steps(N));
        emit<Words>(m, out + h * d, s.C());
      }
    }
  }
}

// m.ds = m.p ∘ (dp − Σ p ∘ dp), dp standing in m.ds; added to `sum`; then times by_query · by_key.
void scores_gradient(Room& m, float* sum) {
  long N = m.s.N(), NP = m.s.NP();
  for (long i = 0; i < NP; i += 16) {
    vec mean{}, by_query = load(m.by_query + i);
    for (long j = 0; j < N; j++) mean += load(m.p + j * NP + i) * load(m.ds + j * NP + i);
    for (long j = 0; j < N; j++) {
      vec x = load(m.p + j * NP + i) * (load(m.ds + j * NP + i) - mean);
      store(sum + j * NP + i, load(sum + j * NP + i) + x);
      store(m.ds + j * NP + i, x * (by_query * m.by_key[j]));
    }
  }
}

// What remains of the gradient in m.out when tokens count by their direction alone: less the part along the token.
// Returns Σ token · gradient.
template <typename Words>
float across_direction(Room& m, const float* words, const float* by, float factor) {
  float sum = 0;
  for (long t = 0; t < m.s.N(); t++) {
    const float* token = words + t * Words::width(m.s.d);
    float along = Words::dot(token, m.out + t * m.s.d, m.s.d), inverse_length = by[t] / factor;
    Words::subtract(m.out + t * m.s.d, token, along * inverse_length * inverse_length, m.s.d);
    sum += along;
  }
  return sum;
}

template <typename Words, typename T>
void backward_head(Room& m, const T* qkv, const float* bias, float scale, bool cosine, const T* grad, T* grad_qkv,
                   float* grad_bias, float* grad_scale, long h) {
  long N = m.s.N(), NP = m.s.NP(), d = m.s.d, C = m.s.C(), width = Words::width(d), steps = Words::steps(N);
  probabilities<Words>(m, qkv, h, bias, scale, cosine);
  fetch<Words>(m, grad + h * d, C, m.g);
  product<Words>(N, d, Words::rows(m.p, N, NP, m.factors), Words::row_width(NP), 1, Words::down(m.g, N, d, m.packed),
                 d, m.out, d, steps);
  emit<Words>(m, grad_qkv + 2 * C + h * d, 3 * C);
  transpose(m.g, width, m.across_lanes, NP);
  product<Words>(N, NP, m.v, width, 1, m.across_lanes, NP, m.ds, NP, width);
  scores_gradient(m, grad_bias);
  product<Words>(N, d, Words::across(m.ds, N, NP, m.factors), 1, NP, Words::down(m.k, N, d, m.packed), d, m.out, d,
                 steps);
  if (cosine) *grad_scale += across_direction<Words>(m, m.q, m.by_query, scale) / scale;
  emit<Words>(m, grad_qkv + h * d, 3 * C);
  product<Words>(N, d, Words::rows(m.ds, N, NP, m.factors), Words::row_width(NP), 1, Words::down(m.q, N, d, m.packed),
                 d, m.out, d, steps);
  if (cosine) across_direction<Words>(m, m.k, m.by_key, 1.f);
  emit<Words>(m, grad_qkv + C + h * d, 3 * C);
}

template <typename Words, typename T>
void backward(const Shape& s, const T* qkv, const float* bias, const float* scales, bool cosine, const T* grad,
              T* grad_qkv, float* grad_bias, float* grad_scales, long shares, int threads) {
  long matrix = s.N() * s.NP();
#pragma omp parallel num_threads(threads)
  {
    Room m(s);
#pragma omp for schedule(dynamic, 1)
    for (long share = 0; share < shares; share++)  // each has its own sums: the order of additions never changes
      for (long w = s.windows() * share / shares; w < s.windows() * (share + 1) / shares; w++) {
        m.enter(w);
        for (long h = 0; h < s.heads; h++)
          backward_head<Words>(m, qkv, bias + h * matrix, scales[h], cosine, grad, grad_qkv,
                               grad_bias + (share * s.heads + h) * matrix, grad_scales + share * s.heads + h, h);
      }
  }
}

}  // namespace

extern "C" {

void window_attention_forward(const Shape* s, int half, const void* qkv, const float* bias, const float* scales,
                              int cosine, void* out, int threads) {
  if (!half) return forward<Floats>(*s, (const float*)qkv, bias, scales, cosine, (float*)out, threads);
#ifdef __AVX512BF16__
  if (s->d % 32 == 0) return forward<Pairs>(*s, (const bf16*)qkv, bias, scales, cosine, (bf16*)out, threads);
#endif
  forward<Floats>(*s, (const bf16*)qkv, bias, scales, cosine, (bf16*)out, threads);
}

void window_attention_backward(const Shape* s, int half, const void* qkv, const float* bias, const float* scales,
                               int cosine, const void* grad, void* grad_qkv, float* grad_bias, float* grad_scales,
                               long shares, int threads) {
  if (!half)
    return backward<Floats>(*s, (const float*)qkv, bias, scales, cosine, (const float*)grad, (float*)grad_qkv,
                            grad_bias, grad_scales, shares, threads);
#ifdef __AVX512BF16__
  if (s->d % 32 == 0)
    return backward<Pairs>(*s, (const bf16*)qkv, bias, scales, cosine, (const bf16*)grad, (bf16*)grad_qkv, grad_bias,
                           grad_scales, shares, threads);
#endif
  backward<Floats>(*s, (const bf16*)qkv, bias, scales, cosine, (const bf16*)grad, (bf16*)grad_qkv, grad_bias,
                   grad_scales, shares, threads);
}
}
