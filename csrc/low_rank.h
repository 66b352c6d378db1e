// Two small matrices one after the other, y = act(x @ w_in.T) @ w_out.T + bias: the predictor's and the compensator's
// loops, over the same schemes S as the sparse FFN (kernel.h).
//
// One tile does all multiplications: R tokens x C vectors of columns (12 x 2 with AVX-512: 24 sums in registers), a
// unit of a token broadcast from its row, wherever that lies, against a packed panel of C x L rows of the weight turned
// around, so that one vector holds the same unit of L rows. Weights are small and packed once per call; tokens are not
// packed at all, and the inner activations leave the first product as the rows that the second one broadcasts.
//
// With AMX the tile is one of 32 tokens x 32 columns; the panels are the same.
//
// Tokens go in strips whose outputs stay in L2: a (T, F) array of logits is never written. The softmax of a strip is
// done four rows at a time, which leaves L1 once: largest, exp and sum, then each row over its sum into the block's.
// Every sum runs in an order that depends on the shape alone.
#pragma once
#include <cstring>
#include <limits>

#include "fastfill.h"
#include "job.h"
#include "kernel.h"

namespace fastfill {
namespace {

template <class S>
struct LowRank {
  using Vec = typename S::Vec;
  static constexpr int L = S::L, P = S::P, R = S::R, C = S::C;
  static constexpr int kTile = C * L;  // columns of a panel
  static constexpr int kSoftmaxRows = 4;

  // ---- sizes ----------------------------------------------------------------------------------------------------

  static int tiles(int n) { return (n + kTile - 1) / kTile; }
  static size_t units(int n) { return round_up((n + P - 1) / P, S::kRowUnits); }
  static size_t panel(int n) { return units(n) * kTile * 4; }  // bytes of kTile rows of n elements
  // Floats of a row of n columns: whole panels, and a vector more so that rows do not share cache sets.
  static size_t row(int n) { return (size_t)tiles(n) * kTile + L; }
  static size_t unit_row(int n) { return round_up(units(n) * 4, 64) + 64; }  // bytes

  static size_t out_panels_at(const LowRankJob &j) { return tiles(j.rank) * panel(j.hidden); }
  static size_t bias_at(const LowRankJob &j) { return out_panels_at(j) + tiles(j.columns) * panel(j.rank); }
  static size_t panel_bytes(const LowRankJob &j) { return bias_at(j) + row(j.columns) * 4; }

  struct Layout {  // of a thread's scratch, in bytes
    size_t x;        // R rows of x as units, where x cannot be read in place
    size_t inner;    // the strip's first product
    size_t units;    // the same in the form that is broadcast
    size_t y;        // the strip's outputs
    size_t sum;      // scores: the block's sum
    size_t bytes;
  };
  static Layout layout(const LowRankJob &j) {
    Layout l{};
    l.inner = l.x + R * unit_row(j.hidden);
    l.units = l.inner + (P == 1 ? 0 : round_up(j.strip * row(j.rank) * 4, 64));
    const size_t strip = j.strip + (S::kTiles ? R : 0);  // a tile is read whole
    l.y = l.units + round_up(strip * (P == 1 ? row(j.rank) * 4 : unit_row(j.rank)), 64);
    l.sum = l.y + round_up(j.strip * row(j.columns) * 4, 64);
    l.bytes = l.sum + row(j.columns) * 4;
    return l;
  }
  static size_t scratch_bytes(const LowRankJob &j) { return layout(j).bytes; }

  struct Buffers {
    char *x, *units;
    float *inner, *y, *sum;
    Buffers(const LowRankJob &j, char *scratch) {
      const Layout l = layout(j);
      x = scratch + l.x, units = scratch + l.units;
      inner = (float *)(scratch + l.inner), y = (float *)(scratch + l.y), sum = (float *)(scratch + l.sum);
    }
  };

  // ---- packing --------------------------------------------------------------------------------------------------

  static int pack_tasks(const LowRankJob &j) { return tiles(j.rank) + tiles(j.columns); }

  // Panel `task` of w_in, or of w_out with its part of the bias: [unit][row of the weight], absent rows zero.
  static void pack(const LowRankJob &j, int task, float padding) {
    const bool in = task < tiles(j.rank);
    const int tile = in ? task : task - tiles(j.rank), first = tile * kTile;
    const int rows = smaller(kTile, (in ? j.rank : j.columns) - first), elements = in ? j.hidden : j.rank;
    const char *from = in ? j.w_in + first * j.w_in_stride : j.w_out + first * j.w_out_stride;
    const int64_t stride = in ? j.w_in_stride : j.w_out_stride;
    uint32_t *to = (uint32_t *)(j.panels + (in ? 0 : out_panels_at(j)) + tile * panel(elements));
    if (rows < kTile || elements % (P * S::kRowUnits)) memset(to, 0, panel(elements));
    for (int r = 0; r < rows; r++) S::pack_token(from + r * stride, elements, to + r, kTile);
    if (in) return;
    float *bias = (float *)(j.panels + bias_at(j)) + first;
    S::unpack(j.bias + (size_t)first * S::kInBytes, rows, bias);
    for (int r = rows; r < kTile; r++) bias[r] = padding;
  }

  // ---- multiplying ----------------------------------------------------------------------------------------------

  // out[r][0..n_tiles * kTile) = rows[r] @ panels + bias
  template <int NR>
  static void multiply(const char *const *rows, size_t nu, const char *panels, int n_tiles, const float *bias, float *out,
                       size_t stride) {
    const uint32_t *panel = (const uint32_t *)panels;
    uintptr_t p[NR];
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++) p[r] = (uintptr_t)rows[r];
    for (int tile = 0; tile < n_tiles; tile++) {
      Vec acc[NR][C];
#pragma GCC unroll 16
      for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = S::zero();
      for (uintptr_t i = 0; i < nu * 4; i += 4) {
        typename S::Unit w[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) w[c] = S::load_unit(panel + c * L);
        panel += kTile;
#pragma GCC unroll 16
        for (int r = 0; r < NR; r++) {
          const auto token = S::broadcast((const char *)(p[r] + i));
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) acc[r][c] = S::dot(acc[r][c], w[c], token);
        }
      }
      Vec plus[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) plus[c] = bias ? S::load(bias + tile * kTile + c * L) : S::zero();
#pragma GCC unroll 16
      for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) S::store(out + r * stride + c * L, S::add(acc[r][c], plus[c]));
      out += kTile;
    }
  }

  // Zeros behind the n elements of a row of bf16.
  static void fill(char *row, int n) {
    if constexpr (P > 1) memset(row + (size_t)n * S::kInBytes, 0, units(n) * 4 - (size_t)n * S::kInBytes);
  }

  template <int NR>
  static void multiply_rows(int nr, const char *const *rows, size_t nu, const char *panels, int n_tiles, const float *bias,
                            float *out, size_t stride) {
    if constexpr (S::kTiles) {
      const size_t apart = nr > 1 ? rows[1] - rows[0] : 0;
      S::multiply(nr, rows[0], apart, nu, panels, n_tiles, bias, out, stride);
    } else if constexpr (NR > 0) {
      if (nr == NR)
        multiply<NR>(rows, nu, panels, n_tiles, bias, out, stride);
      else
        multiply_rows<NR - 1>(nr, rows, nu, panels, n_tiles, bias, out, stride);
    }
  }

  // Rows of x are read where they lie if they are in the form that is multiplied and do not share cache sets.
  static bool in_place(const LowRankJob &j) {
    return S::kInPlace && !S::kTiles && j.hidden % P == 0 && j.x_stride % 1024 != 0;
  }

  // Outputs of tokens [t0, t0 + n) into b.y, through b.inner.
  static void strip(const LowRankJob &j, int64_t t0, int n, bool silu, const Buffers &b) {
    [[maybe_unused]] const typename S::Use use{};
    const int parts = (n + R - 1) / R;  // equal parts of at most R tokens
    const size_t inner_row = row(j.rank), y_row = row(j.columns);
    const size_t units_row = P == 1 ? inner_row * 4 : unit_row(j.rank);
    const char *rows[R];
    for (int s = 0; s < parts; s++) {
      const int from = n * s / parts, to = n * (s + 1) / parts;
      for (int t = from; t < to; t++) {
        const char *x = j.x + (t0 + t) * j.x_stride;
        if (!in_place(j)) {
          S::pack_row(x, j.hidden, b.x + (t - from) * unit_row(j.hidden));
          fill(b.x + (t - from) * unit_row(j.hidden), j.hidden);
          x = b.x + (t - from) * unit_row(j.hidden);
        }
        rows[t - from] = x;
      }
      multiply_rows<R>(to - from, rows, units(j.hidden), j.panels, tiles(j.rank), nullptr, b.inner + from * inner_row,
                       inner_row);
    }
    for (int t = 0; t < n; t++) {
      float *inner = b.inner + t * inner_row;
      if (silu)
        for (int i = j.linear_rank; i < j.rank; i += L) S::store(inner + i, S::act(S::load(inner + i), FASTFILL_SILU));
      if (P == 1) continue;
      S::pack_out(inner, j.rank, b.units + t * units_row);
      fill(b.units + t * units_row, j.rank);
    }
    const float *bias = (const float *)(j.panels + bias_at(j));
    for (int s = 0; s < parts; s++) {
      const int from = n * s / parts, to = n * (s + 1) / parts;
      for (int t = from; t < to; t++) rows[t - from] = b.units + t * units_row;
      multiply_rows<R>(to - from, rows, units(j.rank), j.panels + out_panels_at(j), tiles(j.columns), bias,
                       b.y + from * y_row, y_row);
    }
  }

  // ---- scores ---------------------------------------------------------------------------------------------------

  // sum += softmax of each of NR rows. Columns that only fill the last panel have the logit -inf, which makes 0. NaN or
  // +inf in a row makes the sum NaN, and so all of the row, as in torch.
  template <int NR>
  static void add_softmax(float *y, size_t stride, int width, float *sum) {
    Vec high[NR][C], total[NR][C];
    const Vec least = S::all(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) high[r][c] = least, total[r][c] = S::zero();
    for (int i = 0; i < width; i += kTile)
#pragma GCC unroll 4
      for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) high[r][c] = S::max(high[r][c], S::load(y + r * stride + i + c * L));
    float lane[L];
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++) {
      for (int c = 1; c < C; c++) high[r][0] = S::max(high[r][0], high[r][c]);
      S::store(lane, high[r][0]);
      float most = lane[0];
      for (int l = 1; l < L; l++) most = lane[l] > most ? lane[l] : most;
      high[r][0] = S::all(most);
    }
    for (int i = 0; i < width; i += kTile)
#pragma GCC unroll 4
      for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
          float *at = y + r * stride + i + c * L;
          const Vec e = S::exp(S::sub(S::load(at), high[r][0]));
          S::store(at, e);
          total[r][c] = S::add(total[r][c], e);
        }
    Vec scale[NR];
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++) {
      for (int c = 1; c < C; c++) total[r][0] = S::add(total[r][0], total[r][c]);
      S::store(lane, total[r][0]);
      float z = 0;
      for (int l = 0; l < L; l++) z += lane[l];
      scale[r] = S::all(1.0f / z);
    }
    for (int i = 0; i < width; i += kTile)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        Vec s = S::load(sum + i + c * L);
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) s = S::add(S::mul(S::load(y + r * stride + i + c * L), scale[r]), s);
        S::store(sum + i + c * L, s);
      }
  }

  static void scores(const LowRankJob &j, int block, char *scratch) {
    const Buffers b(j, scratch);
    const int width = tiles(j.columns) * kTile, strips = (j.block_size + j.strip - 1) / j.strip;
    memset(b.sum, 0, (size_t)width * 4);
    for (int s = 0; s < strips; s++) {
      const int from = (int64_t)j.block_size * s / strips, to = (int64_t)j.block_size * (s + 1) / strips;
      strip(j, (int64_t)block * j.block_size + from, to - from, false, b);
      int t = 0;
      for (; t + kSoftmaxRows <= to - from; t += kSoftmaxRows)
        add_softmax<kSoftmaxRows>(b.y + t * row(j.columns), row(j.columns), width, b.sum);
      for (; t < to - from; t++) add_softmax<1>(b.y + t * row(j.columns), row(j.columns), width, b.sum);
    }
    memcpy(j.out + block * j.out_stride, b.sum, (size_t)j.columns * 4);
  }

  // ---- compensate -----------------------------------------------------------------------------------------------

  static void compensate(const LowRankJob &j, int index, char *scratch) {
    const Buffers b(j, scratch);
    const int64_t t0 = (int64_t)index * j.strip;
    const int n = (int)(j.tokens - t0 < j.strip ? j.tokens - t0 : j.strip);
    strip(j, t0, n, true, b);
    for (int t = 0; t < n; t++) S::pack_out(b.y + t * row(j.columns), j.columns, j.out + (t0 + t) * j.out_stride);
  }

  static constexpr LowRankLoops loops() {
    return LowRankLoops{R, panel_bytes, scratch_bytes, pack_tasks, pack, scores, compensate};
  }
};

}  // namespace
}  // namespace fastfill
