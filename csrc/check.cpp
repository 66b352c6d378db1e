// Runs every instruction set of this processor on shapes that are multiples of nothing, in buffers of exactly the size
// they need, and compares with sums in double. Built with -fsanitize=address,undefined by tests/test_kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fastfill.h"

namespace {

uint32_t state = 1;
float uniform() {  // in [-1, 1), exact in bf16
  state = state * 1664525u + 1013904223u;
  return (float)((int)(state >> 24) - 128) / 128.0f;
}

template <class T>
struct Exact {  // a heap buffer without spare room, so that reads past its end are seen
  T *p;
  explicit Exact(size_t n) : p(static_cast<T *>(std::malloc(n * sizeof(T) + (n == 0)))) {}
  ~Exact() { std::free(p); }
};

struct Matrix {
  std::vector<float> f;
  Exact<char> bytes;
  Matrix(size_t n, bool bf16, float scale) : f(n), bytes(n * (bf16 ? 2 : 4)) {
    for (size_t i = 0; i < n; i++) {
      f[i] = uniform() * scale;
      uint32_t bits;
      std::memcpy(&bits, &f[i], 4);
      const uint16_t high = (uint16_t)(bits >> 16);
      if (bf16)
        std::memcpy(bytes.p + 2 * i, &high, 2);
      else
        std::memcpy(bytes.p + 4 * i, &f[i], 4);
    }
  }
};

bool check(const char *isa, bool bf16, int h, int f, std::vector<int> tokens, std::vector<int> kept, int threads,
           bool biases = false, bool first = false) {
  std::vector<int64_t> rows{0}, offsets{0};
  std::vector<int64_t> ids;
  for (size_t n = 0; n < tokens.size(); n++) {
    rows.push_back(rows.back() + tokens[n]);
    offsets.push_back(offsets.back() + kept[n]);
    for (int i = 0; i < kept[n]; i++) ids.push_back(first ? i : (int64_t)i * f / kept[n]);
  }
  const size_t t = rows.back();
  Matrix x(t * h, bf16, 1), gate(f * h, bf16, 0.25f), up(f * h, bf16, 0.25f), down(f * h, bf16, 0.25f), init(t * h, bf16, 1);
  Matrix gate_bias(f, bf16, 1), up_bias(f, bf16, 1);
  Exact<char> out(t * h * (bf16 ? 2 : 4));
  Exact<int64_t> exact_ids(ids.size());
  if (!ids.empty()) std::memcpy(exact_ids.p, ids.data(), ids.size() * 8);
  fastfill_call c{};
  c.x = x.bytes.p, c.gate = gate.bytes.p, c.up = up.bytes.p, c.down_t = down.bytes.p, c.init = init.bytes.p;
  if (biases) c.gate_bias = gate_bias.bytes.p, c.up_bias = up_bias.bytes.p;
  c.out = out.p, c.ids = exact_ids.p, c.rows = rows.data(), c.id_offsets = offsets.data();
  c.x_stride = c.gate_stride = c.up_stride = c.down_stride = c.init_stride = c.out_stride = h;
  c.hidden = h, c.neurons = f, c.n_blocks = (int64_t)tokens.size();
  c.dtype = bf16 ? FASTFILL_BF16 : FASTFILL_F32, c.activation = FASTFILL_SILU, c.ids_are_64bit = 1, c.threads = threads;
  c.isa = isa;
  if (fastfill_sparse_ffn(&c) != FASTFILL_OK) return false;

  double worst = 0;
  std::vector<double> y(h);
  for (size_t n = 0; n < tokens.size(); n++)
    for (int64_t row = rows[n]; row < rows[n + 1]; row++) {
      for (int i = 0; i < h; i++) y[i] = init.f[row * h + i];
      for (int64_t k = offsets[n]; k < offsets[n + 1]; k++) {
        double g = biases ? gate_bias.f[ids[k]] : 0, u = biases ? up_bias.f[ids[k]] : 0;
        for (int i = 0; i < h; i++) {
          g += (double)x.f[row * h + i] * gate.f[ids[k] * h + i];
          u += (double)x.f[row * h + i] * up.f[ids[k] * h + i];
        }
        for (int i = 0; i < h; i++) y[i] += g / (1 + std::exp(-g)) * u * down.f[ids[k] * h + i];
      }
      for (int i = 0; i < h; i++) {
        float got;
        if (bf16) {
          uint16_t high;
          std::memcpy(&high, out.p + 2 * (row * h + i), 2);
          const uint32_t bits = (uint32_t)high << 16;
          std::memcpy(&got, &bits, 4);
        } else {
          std::memcpy(&got, out.p + 4 * (row * h + i), 4);
        }
        worst = std::fmax(worst, std::fabs(got - y[i]) / (1 + std::fabs(y[i])));
      }
    }
  const bool good = worst < (bf16 ? 0.02 : 1e-5);
  std::printf("%-12s %s H %d F %d T %zu: worst relative error %.2g%s\n", isa, bf16 ? "bf16" : "fp32", h, f, t, worst,
              good ? "" : "  TOO LARGE");
  return good;
}

float stored(const char *p, bool bf16) {
  uint32_t bits = 0;
  std::memcpy((char *)&bits + (bf16 ? 2 : 0), p, bf16 ? 2 : 4);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

float nearest_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = f != f ? bits : (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Eight bits, written once more: `n` numbers over their largest magnitude / 127; gives the scale, NaN if one is not finite.
float rounded(const float *x, int n, int *q) {
  float top = 0;
  for (int i = 0; i < n; i++) {
    if (!std::isfinite(x[i])) return NAN;
    top = std::fmax(top, std::fabs(x[i]));
  }
  for (int i = 0; i < n; i++) q[i] = top < 0x1p-100f ? 0 : (int)std::nearbyintf(x[i] * (127.0f / top));
  return top < 0x1p-100f ? 0 : top / 127.0f;
}

// Weights in eight bits: with relu to the bit. One token is NaN, one infinite, one zero.
bool check_int8(const char *isa, bool bf16, int h, int f, std::vector<int> tokens, std::vector<int> kept, int threads,
                bool biases) {
  std::vector<int64_t> rows{0}, offsets{0};
  std::vector<int32_t> ids;
  for (size_t n = 0; n < tokens.size(); n++) {
    rows.push_back(rows.back() + tokens[n]);
    offsets.push_back(offsets.back() + kept[n]);
    for (int i = 0; i < kept[n]; i++) ids.push_back((int32_t)((int64_t)i * f / kept[n]));
  }
  const int t = (int)rows.back();
  const size_t element = bf16 ? 2 : 4, weights = (size_t)f * h;
  Matrix x((size_t)t * h, bf16, 1), init((size_t)t * h, bf16, 1), gate_bias(f, bf16, 1), up_bias(f, bf16, 1);
  const auto set = [&](int token, int column, uint32_t bits) {
    std::memcpy(&x.f[(size_t)token * h + column], &bits, 4);
    std::memcpy(x.bytes.p + ((size_t)token * h + column) * element, (char *)&bits + 4 - element, element);
  };
  if (t > 4) {
    set(1, h / 2, 0x7fc00000u), set(3, 0, 0xff800000u);
    for (int i = 0; i < h; i++) set(4, i, 0);
  }
  Exact<int8_t> gate(weights), up(weights), down(weights);
  for (int8_t *w : {gate.p, up.p, down.p})
    for (size_t i = 0; i < weights; i++) w[i] = (int8_t)(uniform() * 128);
  Exact<float> gate_scale(f), up_scale(f), down_scale(h);
  for (int i = 0; i < f; i++) gate_scale.p[i] = 0.01f + 0.005f * uniform(), up_scale.p[i] = 0.01f + 0.005f * uniform();
  for (int i = 0; i < h; i++) down_scale.p[i] = 0.01f + 0.005f * uniform();
  Exact<char> out((size_t)t * h * element);
  Exact<int32_t> exact_ids(ids.size());
  if (!ids.empty()) std::memcpy(exact_ids.p, ids.data(), ids.size() * 4);
  fastfill_call c{};
  c.x = x.bytes.p, c.gate = gate.p, c.up = up.p, c.down_t = down.p, c.init = init.bytes.p;
  c.gate_scale = gate_scale.p, c.up_scale = up_scale.p, c.down_scale = down_scale.p;
  if (biases) c.gate_bias = gate_bias.bytes.p, c.up_bias = up_bias.bytes.p;
  c.out = out.p, c.ids = exact_ids.p, c.rows = rows.data(), c.id_offsets = offsets.data();
  c.x_stride = c.gate_stride = c.up_stride = c.down_stride = c.init_stride = c.out_stride = h;
  c.hidden = h, c.neurons = f, c.n_blocks = (int64_t)tokens.size();
  c.dtype = bf16 ? FASTFILL_BF16 : FASTFILL_F32, c.activation = FASTFILL_RELU, c.threads = threads, c.isa = isa;
  if (fastfill_sparse_ffn(&c) != FASTFILL_OK) return false;
  Exact<int8_t> q((size_t)t * h);
  Exact<float> scale(t);
  fastfill_round_call r{};
  r.x = x.bytes.p, r.q = q.p, r.scale = scale.p, r.x_stride = h, r.rows = t, r.columns = h;
  r.dtype = c.dtype, r.threads = threads, r.isa = isa;
  if (fastfill_round(&r) != FASTFILL_OK) return false;

  const auto same = [](float a, float b) { return a == b || (a != a && b != b); };
  int wrong = 0;
  std::vector<int> qx(h), qh(f);
  std::vector<float> acts, y(h);
  for (size_t n = 0; n < tokens.size(); n++)
    for (int64_t row = rows[n]; row < rows[n + 1]; row++) {
      const float xs = rounded(&x.f[row * h], h, qx.data());
      wrong += !same(scale.p[row], xs);
      for (int i = 0; i < h && xs == xs; i++) wrong += q.p[row * h + i] != qx[i];
      std::fill(y.begin(), y.end(), 0.0f);
      for (int64_t k = offsets[n]; k < offsets[n + 1];) {  // a chunk of neurons
        const int64_t first = k, chunk = ids[k] / FASTFILL_H_CHUNK;
        acts.clear();
        for (; k < offsets[n + 1] && ids[k] / FASTFILL_H_CHUNK == chunk; k++) {
          int gs = 0, us = 0;
          for (int i = 0; i < h; i++) gs += qx[i] * gate.p[(size_t)ids[k] * h + i], us += qx[i] * up.p[(size_t)ids[k] * h + i];
          const float g = gs * (gate_scale.p[ids[k]] * xs) + (biases ? gate_bias.f[ids[k]] : 0);
          const float u = us * (up_scale.p[ids[k]] * xs) + (biases ? up_bias.f[ids[k]] : 0);
          acts.push_back((g > 0 || g != g ? g : 0) * u);
        }
        const float hs = rounded(acts.data(), (int)acts.size(), qh.data());
        for (int i = 0; i < h; i++) {
          int sum = 0;
          for (int64_t m = first; m < k; m++) sum += qh[m - first] * down.p[(size_t)ids[m] * h + i];
          y[i] += sum * hs;
        }
      }
      for (int i = 0; i < h; i++) {
        const float want = y[i] * down_scale.p[i] + init.f[row * h + i], got = stored(out.p + (row * h + i) * element, bf16);
        wrong += !same(got, bf16 ? nearest_bf16(want) : want);
      }
    }
  std::printf("%-12s %s int8 H %d F %d T %d: %s\n", isa, bf16 ? "bf16" : "fp32", h, f, t, wrong ? "WRONG" : "the same bits");
  return !wrong;
}

bool check_product(const char *isa, int t, int n, int k, int threads) {
  Exact<int8_t> a((size_t)t * k), b((size_t)n * k);
  for (int i = 0; i < t * k; i++) a.p[i] = (int8_t)(uniform() * 127);
  for (int i = 0; i < n * k; i++) b.p[i] = (int8_t)(uniform() * 128);
  Exact<float> out((size_t)t * n);
  fastfill_product_call c{};
  c.a = a.p, c.b = b.p, c.out = out.p, c.a_stride = c.b_stride = k, c.out_stride = n;
  c.tokens = t, c.rows = n, c.columns = k, c.threads = threads, c.isa = isa;
  if (fastfill_product(&c) != FASTFILL_OK) return false;
  int wrong = 0;
  for (int i = 0; i < t * n; i++) {
    int sum = 0;
    for (int m = 0; m < k; m++) sum += a.p[(size_t)(i / n) * k + m] * b.p[(size_t)(i % n) * k + m];
    wrong += out.p[i] != (float)sum;
  }
  std::printf("%-12s product T %d N %d K %d: %s\n", isa, t, n, k, wrong ? "WRONG" : "exact");
  return !wrong;
}

bool check_low_rank(const char *isa, bool bf16, int blocks, int block_size, int h, int rank, int columns, int threads) {
  const int t = blocks * block_size, element = bf16 ? 2 : 4;
  Matrix x(t * h, bf16, 1), w_in(rank * h, bf16, 0.25f), w_out(columns * rank, bf16, 0.25f), bias(columns, bf16, 1);
  Exact<float> sums(blocks * columns);
  Exact<char> y((size_t)t * columns * element);
  fastfill_low_rank_call c{};
  c.x = x.bytes.p, c.w_in = w_in.bytes.p, c.w_out = w_out.bytes.p, c.bias = bias.bytes.p;
  c.x_stride = c.w_in_stride = h, c.w_out_stride = rank, c.out_stride = columns;
  c.tokens = t, c.hidden = h, c.rank = rank, c.columns = columns, c.block_size = block_size, c.linear_rank = rank / 2;
  c.dtype = bf16 ? FASTFILL_BF16 : FASTFILL_F32, c.threads = threads, c.isa = isa;
  c.out = sums.p;
  if (fastfill_block_scores(&c) != FASTFILL_OK) return false;
  c.out = y.p;
  if (fastfill_compensate(&c) != FASTFILL_OK) return false;

  double worst = 0;
  std::vector<double> p(columns), sum(columns);
  for (int row = 0; row < t; row++) {
    std::vector<double> inner(rank, 0.0);
    for (int r = 0; r < rank; r++)
      for (int i = 0; i < h; i++) inner[r] += (double)x.f[row * h + i] * w_in.f[r * h + i];
    double z = 0;
    for (int i = 0; i < columns; i++) {
      double logit = bias.f[i], curved = bias.f[i];
      for (int r = 0; r < rank; r++) {
        logit += inner[r] * w_out.f[i * rank + r];
        curved += (r < rank / 2 ? inner[r] : inner[r] / (1 + std::exp(-inner[r]))) * w_out.f[i * rank + r];
      }
      z += p[i] = std::exp(logit);
      const double got = stored(y.p + ((size_t)row * columns + i) * element, bf16);
      worst = std::fmax(worst, std::fabs(got - curved) / (1 + std::fabs(curved)));
    }
    for (int i = 0; i < columns; i++) sum[i] = (row % block_size ? sum[i] : 0) + p[i] / z;
    for (int i = 0; row % block_size == block_size - 1 && i < columns; i++)
      worst = std::fmax(worst, std::fabs(sums.p[row / block_size * columns + i] - sum[i]) / sum[i]);
  }
  const bool good = worst < (bf16 ? 0.05 : 1e-4);
  std::printf("%-12s %s scores T %d H %d r %d F %d: worst relative error %.2g%s\n", isa, bf16 ? "bf16" : "fp32", t, h, rank,
              columns, worst, good ? "" : "  TOO LARGE");

  // Selection from these scores: no score that is left out is larger than one that is kept.
  bool chosen = true;
  for (int kept : {0, 1, columns / 2, columns}) {
    Exact<int32_t> ids(blocks * kept);
    fastfill_top_k_call k{};
    k.scores = sums.p, k.ids = ids.p, k.scores_stride = columns, k.rows = blocks, k.neurons = columns, k.kept = kept;
    k.threads = threads, k.isa = isa;
    chosen &= fastfill_top_k(&k) == FASTFILL_OK;
    for (int n = 0; n < blocks; n++) {
      std::vector<char> is_kept(columns, 0);
      float least = INFINITY, most = -INFINITY;
      for (int i = 0; i < kept; i++) {
        const int32_t id = ids.p[n * kept + i];
        chosen &= i == 0 || id > ids.p[n * kept + i - 1];
        is_kept[id] = 1;
        least = std::fmin(least, sums.p[n * columns + id]);
      }
      for (int i = 0; i < columns; i++)
        if (!is_kept[i]) most = std::fmax(most, sums.p[n * columns + i]);
      chosen &= least >= most;
    }
  }
  if (!chosen) std::printf("%-12s selection WRONG\n", isa);
  return good && chosen;
}

struct Format {
  int kind, columns, bytes;
  std::vector<int> halves;  // where fp16 numbers are
};
const Format kFormats[] = {{2, 32, 18, {0}},      {3, 32, 20, {0, 2}},      {6, 32, 22, {0}},         {7, 32, 24, {0, 2}},
                           {8, 32, 34, {0}},      {12, 256, 144, {0, 2}},   {13, 256, 176, {0, 2}},   {14, 256, 210, {208}}};

float half(const uint8_t *p) {  // of a normal number
  const int h = p[0] | p[1] << 8;
  return std::ldexp((float)(1024 + h % 1024), (h >> 10 & 31) - 25) * (h >> 15 ? -1 : 1);
}

// The i-th weight of a block, bit by bit as ggml's headers say.
float weight(const Format &f, const uint8_t *b, int i) {
  const float d = half(b + f.halves[0]);
  if (f.kind == 8) return d * (int8_t)b[2 + i];
  if (f.columns == 32) {
    const bool five = f.kind >= 6, added = f.kind % 2;
    const uint8_t *at = b + 2 + 2 * added;
    int q = at[4 * five + i % 16] >> i / 16 * 4 & 15;
    if (five) q |= (at[i / 8] >> i % 8 & 1) << 4;
    return added ? d * q + half(b + 2) : d * (q - (five ? 16 : 8));
  }
  if (f.kind == 14) {
    const int low = b[i / 128 * 64 + i % 64] >> i / 64 % 2 * 4 & 15;
    const int high = b[128 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
    return d * (int8_t)b[192 + i / 16] * (low + 16 * high - 32);
  }
  const uint8_t *s = b + 4;
  const int j = i / 32;
  const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
  const int minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
  int q = b[f.bytes - 128 + i / 64 * 32 + i % 32] >> j % 2 * 4 & 15;
  if (f.kind == 13) q |= (b[16 + i % 32] >> j & 1) << 4;
  return d * scale * q - half(b + 2) * minimum;
}

bool check_packed(const char *isa, const Format &f, int rows, int columns, int tokens, int threads) {
  const int blocks = columns / f.columns, row_bytes = blocks * f.bytes;
  Exact<uint8_t> packed((size_t)rows * row_bytes);
  for (int i = 0; i < rows * row_bytes; i++) packed.p[i] = (uint8_t)(uniform() * 128 + 128);
  for (int i = 0; i < rows * blocks; i++)
    for (int at : f.halves) packed.p[i * f.bytes + at + 1] = (packed.p[i * f.bytes + at + 1] & 0x83) | 0x20;  // to 2^-6
  std::vector<float> w((size_t)rows * columns);
  for (size_t i = 0; i < w.size(); i++)
    w[i] = weight(f, packed.p + i / columns * row_bytes + i % columns / f.columns * f.bytes, (int)(i % f.columns));
  Exact<float> values(w.size()), scale(rows), inverse(rows);
  Exact<char> values_bf16(w.size() * 2);
  Exact<int8_t> q(w.size()), turned(w.size());
  fastfill_packed_call c{};
  c.blocks = packed.p, c.blocks_stride = row_bytes, c.rows = rows, c.columns = columns, c.kind = f.kind;
  c.scale = scale.p, c.inverse = inverse.p, c.threads = threads, c.isa = isa, c.out_stride = columns;
  int bad = fastfill_packed_scales(&c);
  c.out = values.p, bad |= fastfill_unpack(&c);
  c.out = values_bf16.p, c.dtype = FASTFILL_BF16, bad |= fastfill_unpack(&c);
  c.out = q.p, bad |= fastfill_unpack_int8(&c);
  c.out = turned.p, c.out_stride = rows, c.transposed = 1, bad |= fastfill_unpack_int8(&c);
  int wrong = 0;
  std::vector<int> want(columns);
  for (int r = 0; r < rows; r++) {
    wrong += scale.p[r] != rounded(&w[(size_t)r * columns], columns, want.data());
    for (int i = 0; i < columns; i++) {
      const size_t at = (size_t)r * columns + i;
      wrong += values.p[at] != w[at] || stored(values_bf16.p + 2 * at, true) != nearest_bf16(w[at]);
      wrong += q.p[at] != want[i] || turned.p[(size_t)i * rows + r] != want[i];
    }
  }
  double worst = 0;
  for (bool bf16 : {false, true}) {
    Matrix x((size_t)tokens * columns, bf16, 1);
    Exact<char> y((size_t)tokens * rows * (bf16 ? 2 : 4));
    c.x = x.bytes.p, c.out = y.p, c.x_stride = columns, c.tokens = tokens, c.dtype = bf16 ? FASTFILL_BF16 : FASTFILL_F32;
    bad |= fastfill_packed_linear(&c);
    for (int i = 0; i < tokens * rows; i++) {
      double sum = 0, size = 0;
      for (int k = 0; k < columns; k++) {
        const double product = (double)x.f[(size_t)(i / rows) * columns + k] * w[(size_t)(i % rows) * columns + k];
        sum += product, size += std::fabs(product);
      }
      const double error = std::fabs(stored(y.p + (size_t)i * (bf16 ? 2 : 4), bf16) - sum) / size;
      worst = std::fmax(worst, bf16 ? error / 256 : error);
    }
  }
  const bool good = !bad && !wrong && worst < 2e-5;
  std::printf("%-12s kind %d R %d C %d T %d: %s, worst relative error %.2g%s\n", isa, f.kind, rows, columns, tokens,
              bad || wrong ? "WRONG" : "the same bits", worst, good ? "" : "  TOO LARGE");
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (int i = 0; i < fastfill_isa_count(); i++) {
    if (!fastfill_isa_supported(i)) continue;
    const char *isa = fastfill_isa_name(i);
    for (const Format &f : kFormats) {
      good &= check_packed(isa, f, 131, 768, 3, 2);
      good &= check_packed(isa, f, 3, f.columns == 32 ? 2144 : 2304, 11, 2);
      good &= check_packed(isa, f, 1, f.columns, 1, 1);
    }
    good &= check_product(isa, 1, 5, 3, 2);
    good &= check_product(isa, 37, 131, 77, 2);
    good &= check_product(isa, 16, 24, 64, 1);
    for (bool bf16 : {false, true}) {
      good &= check(isa, bf16, 33, 77, {1, 0, 16, 37}, {77, 5, 0, 13}, 2);
      good &= check(isa, bf16, 64, 130, {16, 16, 32, 3, 40}, {65, 65, 1, 130, 64}, 3);
      good &= check(isa, bf16, 64, 130, {16, 16, 32, 3, 40}, {65, 65, 1, 130, 64}, 3, true);
      good &= check(isa, bf16, 1, 1, {1}, {1}, 1, true);
      good &= check(isa, bf16, 70, 1100, {8, 8, 8, 8, 8, 600}, {500, 501, 502, 503, 504, 9}, 2);
      good &= check(isa, bf16, 128, 40, {20, 20, 20, 20, 20}, {20, 21, 22, 23, 24}, 2);  // rows of 512 bytes: packed
      good &= check(isa, bf16, 64, 5000, {20, 3, 16}, {1, 33, 2499}, 2, false, true);  // none in the last chunks
      good &= check(isa, bf16, 512, 60, {20, 20, 20, 20, 20}, {20, 21, 22, 23, 24}, 2);
      good &= check_int8(isa, bf16, 33, 77, {1, 0, 16, 37}, {77, 5, 0, 13}, 2, true);
      good &= check_int8(isa, bf16, 64, 130, {16, 16, 32, 3, 40}, {65, 65, 1, 130, 64}, 3, false);
      good &= check_int8(isa, bf16, 1, 1, {1}, {1}, 1, true);
      good &= check_int8(isa, bf16, 71, 2100, {8, 8, 530}, {1025, 2100, 9}, 2, false);
      good &= check_int8(isa, bf16, 1024, 40, {20, 20, 20}, {20, 21, 40}, 2, true);  // rows that are packed
      good &= check_low_rank(isa, bf16, 3, 7, 33, 5, 77, 2);
      good &= check_low_rank(isa, bf16, 2, 130, 64, 16, 130, 3);
      good &= check_low_rank(isa, bf16, 1, 1, 1, 1, 1, 1);
      good &= check_low_rank(isa, bf16, 2, 14, 512, 3, 12001, 2);  // several strips in a block
    }
  }
  const bool counted = fastfill_scratch_bytes() > 0;
  fastfill_release();
  if (!counted || fastfill_scratch_bytes() != 0) std::puts("scratch is not counted or not released"), good = false;
  std::puts(good ? "all good" : "FAILED");
  return good ? 0 : 1;
}
