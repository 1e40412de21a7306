// Window attention on a CPU, forward and backward. models/ops/native_attention.py compiles and calls it;
// models/ops/reference.py is the definition.
//
// A thread computes one window at a time and keeps all of it in its caches. Tokens are loaded from the unsplit
// projection (B, H, W, 3, nH, d) at the positions given by the cyclic shift, and results are stored at their token's
// position. Scores are kept transposed, keys by queries, so that the softmax runs down the columns and no vector has to
// be summed across its lanes.
//
// Shapes: B batch, H W token grid, C channels, N tokens in a window, NP is N rounded up to whole vectors of 16,
// nH heads, d head dimension.
#include "packs.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace {

struct Shape {  // as native_attention.py passes it; H and W are multiples of the window
  long B, H, W, num_heads, d, window, shift_h, shift_w;
  long rows() const { return H / window; }
  long columns() const { return W / window; }
  long N() const { return window * window; }
  long NP() const { return (N() + 15) / 16 * 16; }
  long C() const { return num_heads * d; }
  long num_windows() const { return B * rows() * columns(); }
};

// c (R, 16 L) = a (R, K packs) b (K packs, 16 L). The pack of a in row r at k is a[r * row_stride + k * k_stride].
template <typename Pack, int R, int L>
inline void matmul_tile(const float* a, long row_stride, long k_stride, const float* b, long ldb, float* c, long ldc,
                        long K) {
  vec sum[R][L];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) sum[r][l] = vec{};
  for (long k = 0; k < K; k++) {
    vec b_row[L];
    for (int l = 0; l < L; l++) b_row[l] = load(b + k * ldb + 16 * l);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int l = 0; l < L; l++) sum[r][l] = Pack::multiply_add(sum[r][l], a[r * row_stride + k * k_stride], b_row[l]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) store(c + r * ldc + 16 * l, sum[r][l]);
}

// 16 L columns of c = a b: blocks of at most 8 of the M rows, as equal as possible.
template <typename Pack, int L>
void matmul_columns(long M, const float* a, long row_stride, long k_stride, const float* b, long ldb, float* c,
                    long ldc, long K) {
  long blocks = (M + 7) / 8;
  for (long n = 0, i = 0; n < blocks; n++) {
    long R = M / blocks + (n < M % blocks);
    const float* a_block = a + i * row_stride;
    float* c_block = c + i * ldc;
    switch (R) {
      case 8: matmul_tile<Pack, 8, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      case 7: matmul_tile<Pack, 7, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      case 6: matmul_tile<Pack, 6, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      case 5: matmul_tile<Pack, 5, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      case 4: matmul_tile<Pack, 4, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      case 3: matmul_tile<Pack, 3, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      case 2: matmul_tile<Pack, 2, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K); break;
      default: matmul_tile<Pack, 1, L>(a_block, row_stride, k_stride, b, ldb, c_block, ldc, K);
    }
    i += R;
  }
}

// c (M, columns) = a (M, K packs) b (K packs, columns); columns is a multiple of 16.
template <typename Pack>
void matmul(long M, long columns, const float* a, long row_stride, long k_stride, const float* b, long ldb, float* c,
            long ldc, long K) {
  long j = 0;
  for (; j + 32 <= columns; j += 32)
    matmul_columns<Pack, 2>(M, a, row_stride, k_stride, b + j, ldb, c + j, ldc, K);
  if (j < columns) matmul_columns<Pack, 1>(M, a, row_stride, k_stride, b + j, ldb, c + j, ldc, K);
}

// Transposes packs of tokens (NP, width) to (width, NP).
void transpose(const float* from, long width, float* to, long NP) {
  for (long t = 0; t < NP; t += 16)
    for (long w = 0; w < width; w += 16) {
      vec x[16];
      for (int r = 0; r < 16; r++) x[r] = load(from + (t + r) * width + w);
      exchange_blocks<8>(x);
      exchange_blocks<4>(x);
      exchange_blocks<2>(x);
      exchange_blocks<1>(x);
      for (int r = 0; r < 16; r++) store(to + (w + r) * NP + t, x[r]);
    }
}

// Buffers of one thread: token positions and mask of its current window, and the matrices of one head.
struct Workspace {
  const Shape& s;
  float *q, *k, *v, *grad_out, *transposed, *packed_tokens, *packed_matrix, *out, *probs, *grad_scores, *mask;
  float *query_scale, *key_scale, *memory;
  long* position;  // (N,) of a token in the maps of the batch
  int* region;     // (N,)
  bool masked;

  explicit Workspace(const Shape& shape) : s(shape) {
    long N = s.N(), NP = s.NP(), tokens = NP * s.d, matrix = NP * NP;
    long size = 7 * tokens + 4 * matrix + 2 * NP;
    memory = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
    position = static_cast<long*>(std::malloc(N * sizeof(long)));
    region = static_cast<int*>(std::malloc(N * sizeof(int)));
    if (!allocated()) return;
    std::memset(memory, 0, size * sizeof(float));  // tokens beyond N stay zero
    float* next = memory;
    auto take = [&](long n) { float* buffer = next; next += n; return buffer; };
    q = take(tokens), k = take(tokens), v = take(tokens), grad_out = take(tokens);
    transposed = take(tokens), packed_tokens = take(tokens), out = take(tokens);
    probs = take(matrix), grad_scores = take(matrix), mask = take(matrix), packed_matrix = take(matrix);
    query_scale = take(NP), key_scale = take(NP);
  }
  bool allocated() const { return memory && position && region; }
  ~Workspace() { std::free(memory), std::free(position), std::free(region); }

  // Computes positions and mask of a window. Regions are those of region_ids in models/ops/window.py: per axis, 1 for
  // tokens that the shift wrapped around.
  void set_window(long window) {
    long in_image = window % (s.rows() * s.columns()), image = window / (s.rows() * s.columns());
    long top = in_image / s.columns() * s.window, left = in_image % s.columns() * s.window;
    masked = false;
    for (long t = 0; t < s.N(); t++) {
      long y = (top + t / s.window + s.shift_h) % s.H, x = (left + t % s.window + s.shift_w) % s.W;
      region[t] = 2 * (y < s.shift_h) + (x < s.shift_w);
      position[t] = (image * s.H + y) * s.W + x;
      masked |= region[t] != region[0];
    }
    if (!masked) return;
    for (long j = 0; j < s.N(); j++)
      for (long i = 0; i < s.N(); i++) mask[j * s.NP() + i] = region[i] == region[j] ? 0.f : -100.f;
  }
};

// Loads one head's tokens of the window as packs: (N, packs(d)).
template <typename Pack, typename T>
void load_tokens(const Workspace& ws, const T* from, long stride, float* to) {
  long width = Pack::packs(ws.s.d);
  for (long t = 0; t < ws.s.N(); t++) Pack::load_token(from + ws.position[t] * stride, ws.s.d, to + t * width);
}

// Stores ws.out (N, d) at the positions of its tokens.
template <typename Pack, typename T>
void store_tokens(const Workspace& ws, T* to, long stride) {
  for (long t = 0; t < ws.s.N(); t++)
    Pack::store_token(ws.out + t * ws.s.d, ws.s.d, to + ws.position[t] * stride);
}

// inverse[t] = factor / length of token t; 0 for a token of zeros, such as a padded key, whose gradient is then 0.
template <typename Pack>
void inverse_lengths(const Workspace& ws, const float* packs, float factor, float* inverse) {
  long d = ws.s.d, width = Pack::packs(d);
  for (long t = 0; t < ws.s.N(); t++) {
    float* values = ws.out;
    std::fill(values, values + d, 0.f);
    Pack::subtract_scaled(values, packs + t * width, -1.f, d);
    float length = std::sqrt(Pack::dot(packs + t * width, values, d));
    inverse[t] = length < 1e-12f ? 0.f : factor / length;
  }
}

// ws.probs (N keys, NP queries) = SoftMax(q kᵀ · query_scale · key_scale + bias + mask).
template <typename Pack, typename T>
void probabilities(Workspace& ws, const T* qkv, long head, const float* bias, float scale, bool cosine) {
  long N = ws.s.N(), NP = ws.s.NP(), d = ws.s.d, C = ws.s.C(), width = Pack::packs(d);
  load_tokens<Pack>(ws, qkv + head * d, 3 * C, ws.q);
  load_tokens<Pack>(ws, qkv + C + head * d, 3 * C, ws.k);
  load_tokens<Pack>(ws, qkv + 2 * C + head * d, 3 * C, ws.v);
  std::fill(ws.query_scale, ws.query_scale + NP, scale);
  std::fill(ws.key_scale, ws.key_scale + N, 1.f);
  if (cosine) {
    inverse_lengths<Pack>(ws, ws.q, scale, ws.query_scale);
    inverse_lengths<Pack>(ws, ws.k, 1.f, ws.key_scale);
  }
  transpose(ws.q, width, ws.transposed, NP);
  matmul<Pack>(N, NP, ws.k, width, 1, ws.transposed, NP, ws.probs, NP, width);
  for (long i = 0; i < NP; i += 16) {
    vec query_scale = load(ws.query_scale + i), max_score = vec{} - 3e38f, sum{};
    for (long j = 0; j < N; j++) {
      vec x = load(ws.probs + j * NP + i) * (query_scale * ws.key_scale[j]) + load(bias + j * NP + i);
      if (ws.masked) x += load(ws.mask + j * NP + i);
      store(ws.probs + j * NP + i, x);
      max_score = max(max_score, x);
    }
    for (long j = 0; j < N; j++) {
      vec x = exp_nonpositive(load(ws.probs + j * NP + i) - max_score);
      store(ws.probs + j * NP + i, x);
      sum += x;
    }
    vec inverse_sum = 1.f / sum;
    for (long j = 0; j < N; j++) store(ws.probs + j * NP + i, load(ws.probs + j * NP + i) * inverse_sum);
  }
}

template <typename Pack, typename T>
int forward(const Shape& s, const T* qkv, const float* bias, const float* scales, bool cosine, T* out, int threads) {
  long N = s.N(), NP = s.NP(), d = s.d;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Workspace ws(s);
    failed = !ws.allocated();
#pragma omp for schedule(static)
    for (long w = 0; w < s.num_windows(); w++) {
      if (failed) continue;
      ws.set_window(w);
      for (long h = 0; h < s.num_heads; h++) {
        probabilities<Pack>(ws, qkv, h, bias + h * N * NP, scales[h], cosine);
        const float* v = Pack::pack_tokens(ws.v, N, d, ws.packed_tokens);
        const float* probs = Pack::pack_rows(ws.probs, N, NP, ws.packed_matrix);
        matmul<Pack>(N, d, probs, 1, NP, v, d, ws.out, d, Pack::packs(N));
        store_tokens<Pack>(ws, out + h * d, s.C());
      }
    }
  }
  return failed;
}

// Backward pass of the softmax: ws.grad_scores holds grad_probs and becomes probs ∘ (grad_probs − Σ probs ∘ grad_probs).
// That is added to grad_bias; then ws.grad_scores is multiplied by query_scale · key_scale.
void softmax_backward(Workspace& ws, float* grad_bias) {
  long N = ws.s.N(), NP = ws.s.NP();
  for (long i = 0; i < NP; i += 16) {
    vec mean{}, query_scale = load(ws.query_scale + i);
    for (long j = 0; j < N; j++) mean += load(ws.probs + j * NP + i) * load(ws.grad_scores + j * NP + i);
    for (long j = 0; j < N; j++) {
      vec x = load(ws.probs + j * NP + i) * (load(ws.grad_scores + j * NP + i) - mean);
      store(grad_bias + j * NP + i, load(grad_bias + j * NP + i) + x);
      store(ws.grad_scores + j * NP + i, x * (query_scale * ws.key_scale[j]));
    }
  }
}

// Backward pass of the normalization: removes from the gradients in ws.out their component along the token.
// Returns Σ token · gradient.
template <typename Pack>
float normalize_backward(Workspace& ws, const float* packs, const float* scaled_inverse_length, float factor) {
  float sum = 0;
  for (long t = 0; t < ws.s.N(); t++) {
    const float* token = packs + t * Pack::packs(ws.s.d);
    float along = Pack::dot(token, ws.out + t * ws.s.d, ws.s.d), inverse_length = scaled_inverse_length[t] / factor;
    Pack::subtract_scaled(ws.out + t * ws.s.d, token, along * inverse_length * inverse_length, ws.s.d);
    sum += along;
  }
  return sum;
}

template <typename Pack, typename T>
void backward_head(Workspace& ws, const T* qkv, const float* bias, float scale, bool cosine, const T* grad_out,
                   T* grad_qkv, float* grad_bias, float* grad_scale, long h) {
  long N = ws.s.N(), NP = ws.s.NP(), d = ws.s.d, C = ws.s.C(), width = Pack::packs(d), K = Pack::packs(N);
  probabilities<Pack>(ws, qkv, h, bias, scale, cosine);

  load_tokens<Pack>(ws, grad_out + h * d, C, ws.grad_out);  // grad_v = probsᵀ grad_out
  const float* tokens = Pack::pack_tokens(ws.grad_out, N, d, ws.packed_tokens);
  const float* matrix = Pack::pack_columns(ws.probs, N, NP, ws.packed_matrix);
  matmul<Pack>(N, d, matrix, Pack::packs(NP), 1, tokens, d, ws.out, d, K);
  store_tokens<Pack>(ws, grad_qkv + 2 * C + h * d, 3 * C);

  transpose(ws.grad_out, width, ws.transposed, NP);  // grad_probs = grad_out vᵀ
  matmul<Pack>(N, NP, ws.v, width, 1, ws.transposed, NP, ws.grad_scores, NP, width);
  softmax_backward(ws, grad_bias);

  matrix = Pack::pack_rows(ws.grad_scores, N, NP, ws.packed_matrix);  // grad_q = grad_scores k
  tokens = Pack::pack_tokens(ws.k, N, d, ws.packed_tokens);
  matmul<Pack>(N, d, matrix, 1, NP, tokens, d, ws.out, d, K);
  if (cosine) *grad_scale += normalize_backward<Pack>(ws, ws.q, ws.query_scale, scale) / scale;
  store_tokens<Pack>(ws, grad_qkv + h * d, 3 * C);

  matrix = Pack::pack_columns(ws.grad_scores, N, NP, ws.packed_matrix);  // grad_k = grad_scoresᵀ q
  tokens = Pack::pack_tokens(ws.q, N, d, ws.packed_tokens);
  matmul<Pack>(N, d, matrix, Pack::packs(NP), 1, tokens, d, ws.out, d, K);
  if (cosine) normalize_backward<Pack>(ws, ws.k, ws.key_scale, 1.f);
  store_tokens<Pack>(ws, grad_qkv + C + h * d, 3 * C);
}

template <typename Pack, typename T>
int backward(const Shape& s, const T* qkv, const float* bias, const float* scales, bool cosine, const T* grad_out,
              T* grad_qkv, float* grad_bias, float* grad_scales, long splits, int threads) {
  long matrix = s.N() * s.NP(), windows = s.num_windows();
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Workspace ws(s);
    failed = !ws.allocated();
#pragma omp for schedule(dynamic, 1)
    for (long split = 0; split < splits; split++)  // each has its own sums: the order of additions never changes
      for (long w = windows * split / splits; !failed && w < windows * (split + 1) / splits; w++) {
        ws.set_window(w);
        for (long h = 0; h < s.num_heads; h++)
          backward_head<Pack>(ws, qkv, bias + h * matrix, scales[h], cosine, grad_out, grad_qkv,
                              grad_bias + (split * s.num_heads + h) * matrix, grad_scales + split * s.num_heads + h, h);
      }
  }
  return failed;
}

}  // namespace

// Both return 0, or 1 when out of memory.
extern "C" {

int window_attention_forward(const Shape* s, int is_bf16, const void* qkv, const float* bias, const float* scales,
                             int cosine, void* out, int threads) {
  if (!is_bf16) return forward<PackF32>(*s, (const float*)qkv, bias, scales, cosine, (float*)out, threads);
#ifdef __AVX512BF16__
  if (s->d % 32 == 0) return forward<PackBf16>(*s, (const bf16*)qkv, bias, scales, cosine, (bf16*)out, threads);
#endif
  return forward<PackF32>(*s, (const bf16*)qkv, bias, scales, cosine, (bf16*)out, threads);
}

int window_attention_backward(const Shape* s, int is_bf16, const void* qkv, const float* bias, const float* scales,
                              int cosine, const void* grad_out, void* grad_qkv, float* grad_bias, float* grad_scales,
                              long splits, int threads) {
  if (!is_bf16)
    return backward<PackF32>(*s, (const float*)qkv, bias, scales, cosine, (const float*)grad_out, (float*)grad_qkv,
                             grad_bias, grad_scales, splits, threads);
#ifdef __AVX512BF16__
  if (s->d % 32 == 0)
    return backward<PackBf16>(*s, (const bf16*)qkv, bias, scales, cosine, (const bf16*)grad_out, (bf16*)grad_qkv,
                              grad_bias, grad_scales, splits, threads);
#endif
  return backward<PackF32>(*s, (const bf16*)qkv, bias, scales, cosine, (const bf16*)grad_out, (bf16*)grad_qkv,
                           grad_bias, grad_scales, splits, threads);
}
}
