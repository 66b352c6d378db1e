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
           bool biases = false) {
  std::vector<int64_t> rows{0}, offsets{0};
  std::vector<int64_t> ids;
  for (size_t n = 0; n < tokens.size(); n++) {
    rows.push_back(rows.back() + tokens[n]);
    offsets.push_back(offsets.back() + kept[n]);
    for (int i = 0; i < kept[n]; i++) ids.push_back((int64_t)i * f / kept[n]);
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

}  // namespace

int main() {
  bool good = true;
  for (int i = 0; i < fastfill_isa_count(); i++) {
    if (!fastfill_isa_supported(i)) continue;
    const char *isa = fastfill_isa_name(i);
    for (bool bf16 : {false, true}) {
      good &= check(isa, bf16, 33, 77, {1, 0, 16, 37}, {77, 5, 0, 13}, 2);
      good &= check(isa, bf16, 64, 130, {16, 16, 32, 3, 40}, {65, 65, 1, 130, 64}, 3);
      good &= check(isa, bf16, 64, 130, {16, 16, 32, 3, 40}, {65, 65, 1, 130, 64}, 3, true);
      good &= check(isa, bf16, 1, 1, {1}, {1}, 1, true);
      good &= check(isa, bf16, 70, 1100, {8, 8, 8, 8, 8, 600}, {500, 501, 502, 503, 504, 9}, 2);
      good &= check(isa, bf16, 128, 40, {20, 20, 20, 20, 20}, {20, 21, 22, 23, 24}, 2);  // rows of 512 bytes: packed
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
