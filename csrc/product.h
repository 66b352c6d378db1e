// The product of two int8 matrices, sums exact: the schemes and the tile of the sparse FFN's first half (kernel.h). Tokens are
// turned around once, rows of b are broadcast; a chunk of rows stays in L2 while all tokens pass over it.
#pragma once
#include <cstring>

#include "job.h"
#include "kernel.h"

namespace fastfill {
namespace {

template <class S>
struct Product {
  using Acc = typename S::Acc;
  static constexpr int L = S::L, V = S::V, NR = 2 * S::NN;
  static_assert(S::kInt8 && S::P == 4 && (S::kXOffset == 0 || S::kXOffset == 128), "four bytes a unit");
  static constexpr uint32_t kOffset = S::kXOffset ? 0x80808080u : 0;  // adds 128 to each byte

  static size_t units(const ProductJob &j) { return (j.columns + 3) / 4; }
  static size_t row_bytes(const ProductJob &j) { return round_up(units(j) * 4, 64) + 64; }  // rows share no cache sets
  static size_t scratch_bytes(const ProductJob &j) { return j.chunk * (row_bytes(j) + sizeof(int32_t)); }
  static int width(const ProductJob &j) { return j.tokens <= L ? L : V * L; }  // tokens of a strip

  // Units of a strip's tokens: [unit][token], absent tokens zero.
  static void pack(const ProductJob &j, int strip) {
    const int n = width(j);
    uint32_t *to = j.packed + (size_t)strip * n * units(j);
    for (int t = 0; t < n; t++) {
      const int64_t token = (int64_t)strip * n + t;
      const int8_t *row = j.a + token * j.a_stride;
      for (int i = 0; i < j.columns; i += 4) {
        uint32_t unit = 0;
        if (token < j.tokens) memcpy(&unit, row + i, smaller(4, j.columns - i));
        to[(size_t)(i / 4) * n + t] = unit ^ kOffset;
      }
    }
  }

  template <int NV>
  static void tile(const char *const *rows, const int32_t *starts, size_t nu, const uint32_t *xp, float *out) {
    Acc sum[NR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[r][v] = S::all_of(starts[r]);
    uintptr_t p[NR];
    for (int r = 0; r < NR; r++) p[r] = (uintptr_t)rows[r];
    for (uintptr_t i = 0; i < nu * 4; i += 4) {
      typename S::Unit x[NV];
      for (int v = 0; v < NV; v++) x[v] = S::load_unit(xp + v * L);
      xp += NV * L;
#pragma GCC unroll 16
      for (int r = 0; r < NR; r++) {
        const auto w = S::broadcast((const char *)(p[r] + i));
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sum[r][v] = S::dot(sum[r][v], x[v], w);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) S::store(out + (r * NV + v) * L, S::floats(sum[r][v]));
  }

  static void multiply(const ProductJob &j, int task, char *scratch) {
    const int r0 = task * j.chunk, n_rows = smaller(j.chunk, j.rows - r0), n = width(j);
    const size_t nu = units(j), stride = row_bytes(j);
    int32_t *starts = (int32_t *)(scratch + j.chunk * stride);
    for (int r = 0; r < n_rows; r++) {
      const char *row = (const char *)(j.b + (r0 + r) * j.b_stride);
      S::pack_row(row, j.columns, scratch + r * stride);
      starts[r] = S::kXOffset ? -S::kXOffset * S::row_sum(row, j.columns) : 0;
    }
    for (int64_t t0 = 0; t0 < j.tokens; t0 += n) {
      const uint32_t *xp = j.packed + t0 * nu;
      const int tokens = j.tokens - t0 < n ? (int)(j.tokens - t0) : n;
      for (int i = 0; i < n_rows; i += NR) {
        const char *rows[NR];
        int32_t start[NR];
        const int valid = smaller(NR, n_rows - i);
        for (int r = 0; r < NR; r++) {
          const int at = i + smaller(r, valid - 1);
          rows[r] = scratch + at * stride, start[r] = starts[at];
        }
        float sums[NR * V * L];
        if (n == L)
          tile<1>(rows, start, nu, xp, sums);
        else
          tile<V>(rows, start, nu, xp, sums);
        for (int t = 0; t < tokens; t++)
          for (int r = 0; r < valid; r++) j.out[(t0 + t) * j.out_stride + r0 + i + r] = sums[r * n + t];
      }
    }
  }

  static constexpr ProductLoops loops() { return ProductLoops{NR, width, scratch_bytes, pack, multiply}; }
};

}  // namespace
}  // namespace fastfill
