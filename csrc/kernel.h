// The loops of the sparse FFN, written once over a scheme S (vector and element types) and compiled once per
// instruction set by the isa_*.cpp files. Numbers: Zen 5, 2 cores, bf16, T = 1024, half of the neurons, 2026-11-23.
//
// Three passes, each cut into tasks that any thread may take:
//
// 1. pack_x turns the tokens of each block around, so that one vector holds 16 tokens of one pair of columns of x. It
//    is done once per token and costs 1 to 3 %, and it is what lets the weights stay as they are: a pair of a neuron's
//    weights is broadcast from its row, wherever that lies, and multiplied with 16 tokens. No gather, no sum across a
//    vector. 6 neurons (gate and up) x 2 vectors of tokens are 24 sums in registers; such a tile alone, in L1, runs at
//    97 % of the processor's peak (491 of 505 GFLOP/s per core).
// 2. gate_up: for each chunk of neurons, for each block, for each 32 tokens: the tile over all of H, for the block's
//    neurons in the chunk. The chunk is at most 512 KB, so it stays in L2 while all blocks pass over it, and weights
//    come from memory once per 2,048 tokens and not once per block. Per block only whole tiles are done, up to 5
//    neurons wait for the next chunk: a block has about 16 neurons in a chunk of a 4096 x 14336 layer, and a ragged
//    last tile would cost a sixth. h = act(g) * u leaves as pairs of neurons in the form pass 3 broadcasts.
// 3. down: for each task of up to 256 columns, for each chunk of neurons, for each block, for each 32 columns, for each
//    12 tokens: 24 sums again, now a pair of h of one token broadcast against 16 columns of two neurons, interleaved by
//    two shuffles. y is in fp32 and stays in the thread; adding chunk by chunk to a y of all columns instead would move
//    T x H x 4 bytes per chunk, 7 GB per layer of 4096 x 14336.
//
// What else decided the shape, each measured (docs/log.md):
// - Down's rows are copied into a panel of the chunk, 32 columns of all its neurons side by side: in place, rows 8 KB
//   apart fall into the same few cache sets. Gate and up are read in place unless their rows are a multiple of 1 KB,
//   for the same reason: in place at H = 2048, B = 16 took twice as long.
// - The next chunk is asked for while the current one is worked on, a few lines per tile: 17 % of pass 2 at
//   4096 x 14336 and B = 16, 1 to 2 % at B = 32.
// - A down tile starts from zero and adds y at its end, so that y may arrive from L3 meanwhile: with the chunk asked
//   for ahead, 4 to 20 % of pass 3.
// - Scratch memory in huge pages: 7 to 16 % at 4096 x 14336, nothing on small layers.
//
// Every sum runs in the same order whatever the threads: g and u over H in one go, y over chunks whose size depends on
// the shape alone.
#pragma once
#include <cstring>

#include "fastfill.h"
#include "job.h"

namespace fastfill {
namespace {

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
inline int smaller(int a, int b) { return a < b ? a : b; }

// First position in ids[0..k) whose neuron is >= f.
inline int lower_bound(const int32_t *ids, int k, int32_t f) {
  int lo = 0;
  while (k > 0) {
    int half = k / 2;
    if (ids[lo + half] < f) {
      lo += half + 1;
      k -= half + 1;
    } else {
      k = half;
    }
  }
  return lo;
}

inline void prefetch(const char *p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// Asks for rows that come next, a few cache lines at a time, while others are worked on.
struct Ahead {
  const char *row;
  int64_t stride;
  int rows;
  int64_t bytes;  // of each row
  int64_t at = 0;

  void advance(int lines) {
    for (; lines > 0 && rows > 0; lines--) {
      prefetch(row + at);
      at += 64;
      if (at >= bytes) at = 0, row += stride, rows--;
    }
  }
};

template <class S>
struct Ffn {
  using Vec = typename S::Vec;
  static constexpr int L = S::L, V = S::V, NN = S::NN, N1 = S::N1, P = S::P, R = S::R, C = S::C;
  static constexpr int kTile = C * L;  // columns of a tile of the second half
  static constexpr int kAheadBlocks = 4;  // with fewer blocks most rows of the next chunk may not be wanted
  static constexpr int kMost = NN > N1 ? NN : N1;
  static_assert(NN % P == 0 && N1 % P == 0, "a tile of neurons holds whole units");

  // ---- first half: h = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias) -------------------------------------------------------------

  static size_t units(const Job &j) { return (j.hidden + P - 1) / P; }
  // One packed neuron: its gate row, then its up row; 64 bytes more so that rows do not share cache sets.
  static size_t neuron_bytes(const Job &j) { return round_up(units(j) * 8, 64) + 64; }
  // Rows are read where they lie if they are in the form that is multiplied: no widening, no half unit at the end.
  // And if they do not all start in the same few cache sets, as rows of 4 KB do.
  static bool in_place(const Job &j) {
    return S::kInPlace && j.hidden % P == 0 && j.gate_stride == j.up_stride && j.gate_stride % 1024 != 0;
  }
  static size_t gate_up_bytes(const Job &j) { return in_place(j) ? 0 : (j.chunk + kMost) * neuron_bytes(j) + round_up(j.chunk, 64); }

  // Units of H times vectors of L tokens: [strip][unit][v][lane], absent tokens zero.
  static void pack_x(const Job &j, int n) {
    const Block &b = j.blocks[n];
    const size_t nu = units(j);
    uint32_t *to = j.xp + b.x_at;
    for (int t0 = 0; t0 < b.padded; t0 += V * L) {
      const int width = smaller(V * L, b.padded - t0);
      for (int t = 0; t < width; t++) {
        if (t0 + t >= b.tokens) {
          for (size_t i = 0; i < nu; i++) to[i * width + t] = 0;
          continue;
        }
        S::pack_token(j.x + (b.row0 + t0 + t) * j.x_stride, j.hidden, to + t, width);
      }
      to += nu * width;
    }
  }

  struct Start {  // where the sums of a tile's neurons start: at their biases, or at zero
    float g[kMost] = {}, u[kMost] = {};
  };

  // NT neurons by NV vectors of tokens; `up` is the way from a neuron's gate row to its up row.
  template <int NT, int NV>
  static void gate_up_tile(const char *const *rows, uintptr_t up, const Start &start, size_t nu, const uint32_t *xp,
                           int valid, int act, uint32_t *h, size_t h_stride) {
    Vec g[NT][NV], u[NT][NV];
    for (int r = 0; r < NT; r++)
      for (int v = 0; v < NV; v++) g[r][v] = S::all(start.g[r]), u[r][v] = S::all(start.u[r]);
    uintptr_t p[NT];
    for (int r = 0; r < NT; r++) p[r] = (uintptr_t)rows[r];
    for (uintptr_t i = 0; i < nu * 4; i += 4) {
      typename S::Unit x[NV];
      for (int v = 0; v < NV; v++) x[v] = S::load_unit(xp + v * L);
      xp += NV * L;
#pragma GCC unroll 16
      for (int r = 0; r < NT; r++) {
        const auto wg = S::broadcast((const char *)(p[r] + i));
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) g[r][v] = S::dot(g[r][v], x[v], wg);
        const auto wu = S::broadcast((const char *)(p[r] + i + up));
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) u[r][v] = S::dot(u[r][v], x[v], wu);
      }
    }
    for (int r = 0; r < NT; r++)
      for (int v = 0; v < NV; v++) g[r][v] = S::mul(S::act(g[r][v], act), u[r][v]);
    for (int r = 0; r < valid; r += P)
      for (int v = 0; v < NV; v++)
        S::store_h(h + (r / P) * h_stride + v * L, g[r][v], P == 2 && r + 1 < valid ? g[r + P - 1][v] : S::zero());
  }

  static void pack_neuron(const Job &j, int32_t f, char *to) {
    S::pack_row(j.gate + f * j.gate_stride, j.hidden, to);
    S::pack_row(j.up + f * j.up_stride, j.hidden, to + units(j) * 4);
  }

  static void gate_up(const Job &j, int task, char *scratch) {
    const int chunk = task / j.n_groups, group = task % j.n_groups;
    const int32_t f0 = chunk * j.chunk, f1 = smaller(f0 + j.chunk, j.neurons);
    const int n0 = (int64_t)j.n_blocks * group / j.n_groups, n1 = (int64_t)j.n_blocks * (group + 1) / j.n_groups;
    const size_t nu = units(j), stride = neuron_bytes(j);
    const bool direct = in_place(j);
    const uintptr_t up = direct ? (uintptr_t)j.up - (uintptr_t)j.gate : nu * 4;  // from a gate row to its up row
    char *side = scratch + j.chunk * stride;  // neurons of the block that lie before this chunk
    char *packed = side + kMost * stride;        // which neurons of the chunk are packed already
    if (!direct) memset(packed, 0, j.chunk);

    // The next chunk of this thread, most likely, comes from memory while this one is multiplied.
    const int32_t next0 = smaller((task + j.threads) / j.n_groups * j.chunk, j.neurons);
    const int next_rows = n1 - n0 >= kAheadBlocks ? smaller(j.chunk, j.neurons - next0) : 0;
    const int64_t row_bytes = (int64_t)j.hidden * S::kInBytes;
    Ahead next_gate{j.gate + next0 * j.gate_stride, j.gate_stride, next_rows, row_bytes};
    Ahead next_up{j.up + next0 * j.up_stride, j.up_stride, next_rows, row_bytes};
    double tiles = 1;
    for (int n = n0; n < n1; n++) {
      const Block &b = j.blocks[n];
      tiles += (double)b.k * (f1 - f0) / j.neurons / NN * ((b.padded + V * L - 1) / (V * L));
    }
    const int lines = (int)(next_rows * (row_bytes + 63) / 64 / tiles) + 1;

    for (int n = n0; n < n1; n++) {
      const Block &b = j.blocks[n];
      // Whole tiles of neurons only (but at the end): what is left over is done with the next chunk.
      const int nt = b.padded == L ? N1 : NN;
      const int from = lower_bound(b.ids, b.k, f0) / nt * nt;
      int to = lower_bound(b.ids, b.k, f1);
      if (to < b.k) to = to / nt * nt;
      const uint32_t *xp = j.xp + b.x_at;
      for (int i = from; i < to && !direct; i++) {
        const int32_t f = b.ids[i];
        if (f < f0) {
          pack_neuron(j, f, side + (i - from) * stride);
        } else if (!packed[f - f0]) {
          packed[f - f0] = 1;
          pack_neuron(j, f, scratch + (f - f0) * stride);
        }
      }
      for (int t0 = 0; t0 < b.padded; t0 += V * L) {
        const int width = smaller(V * L, b.padded - t0);
        for (int i = from; i < to; i += nt) {
          const char *rows[kMost];
          Start start;
          const int valid = smaller(nt, to - i);
          for (int r = 0; r < nt; r++) {
            const int at = i + smaller(r, valid - 1);
            const int32_t f = b.ids[at];
            rows[r] = direct ? j.gate + f * j.gate_stride
                             : f < f0 ? side + (at - from) * stride : scratch + (f - f0) * stride;
            if (j.gate_bias) S::unpack(j.gate_bias + (size_t)f * S::kInBytes, 1, start.g + r);
            if (j.up_bias) S::unpack(j.up_bias + (size_t)f * S::kInBytes, 1, start.u + r);
          }
          next_gate.advance(lines);
          next_up.advance(lines);
          uint32_t *h = j.h + b.h_at + (size_t)(i / P) * b.padded + t0;
          if (b.padded == L)
            gate_up_tile<N1, 1>(rows, up, start, nu, xp, valid, j.activation, h, b.padded);
          else if (width == V * L)
            gate_up_tile<NN, V>(rows, up, start, nu, xp, valid, j.activation, h, b.padded);
          else
            gate_up_narrow<V - 1>(width / L, rows, up, start, nu, xp, valid, j.activation, h, b.padded);
        }
        xp += nu * width;
      }
    }
  }

  template <int NV>
  static void gate_up_narrow(int nv, const char *const *rows, uintptr_t up, const Start &start, size_t nu,
                             const uint32_t *xp, int valid, int act, uint32_t *h, size_t h_stride) {
    if constexpr (NV > 0) {
      if (nv == NV)
        gate_up_tile<NN, NV>(rows, up, start, nu, xp, valid, act, h, h_stride);
      else
        gate_up_narrow<NV - 1>(nv, rows, up, start, nu, xp, valid, act, h, h_stride);
    }
  }

  // ---- second half: y = init + h @ down_t -----------------------------------------------------------------------

  static constexpr size_t kLine = kTile * S::kDownBytes;  // one neuron's part of a column tile
  static size_t panel_bytes(const Job &j) { return round_up((j.f_chunk + 2) * kLine * j.c_tiles, 64); }
  static size_t down_bytes(const Job &j) {
    const size_t y = (size_t)j.group_tokens * j.c_tiles * kTile * 4;
    return panel_bytes(j) + round_up(y, 64) + round_up((j.f_chunk + 4) * sizeof(uint32_t), 64) + round_up(j.f_chunk, 64);
  }

  // y[r][0..kTile) += sum over units of h[unit][r] * panel rows at[unit]. The sums start from zero in registers and meet
  // y at the end, so that y has the time of the whole tile to arrive from L3.
  template <int NR>
  static void down_tile(const uint32_t *at, int n_units, const char *panel, const uint32_t *h, size_t h_stride, float *y) {
    Vec acc[NR][C];
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) acc[r][c] = S::zero();
    for (int r = 0; r < NR * C; r++) prefetch((const char *)(y + r * L));
    for (int i = 0; i < n_units; i++) {
      typename S::Unit d[C];
      S::load_down(panel + at[i * P], panel + at[i * P + P - 1], d);
#pragma GCC unroll 16
      for (int r = 0; r < NR; r++) {
        const auto hb = S::broadcast(h + r);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = S::dot(acc[r][c], d[c], hb);
      }
      h += h_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        float *to = y + r * kTile + c * L;
        S::store(to, S::add(S::load(to), acc[r][c]));
      }
  }

  template <int NR>
  static void down_tiles(int nr, const uint32_t *at, int n_units, const char *panel, const uint32_t *h, size_t h_stride,
                         float *y) {
    if constexpr (NR > 0) {
      if (nr == NR)
        down_tile<NR>(at, n_units, panel, h, h_stride, y);
      else
        down_tiles<NR - 1>(nr, at, n_units, panel, h, h_stride, y);
    }
  }

  // Columns [c0, c0 + columns) of one neuron into its line of every tile of the panel.
  static void pack_down(const Job &j, int32_t f, int c0, int columns, char *panel, size_t slot) {
    const char *from = j.down_t + f * j.down_stride + (size_t)c0 * S::kInBytes;
    const size_t tile_bytes = (j.f_chunk + 2) * kLine;
    for (int c = 0; c < columns; c += kTile) {
      S::pack_down(from + (size_t)c * S::kInBytes, smaller(kTile, columns - c), panel + slot * kLine);
      panel += tile_bytes;
    }
  }

  static void down(const Job &j, int task, char *scratch) {
    const int cc = task / j.n_groups, group = task % j.n_groups;
    const int n0 = (int64_t)j.n_blocks * group / j.n_groups, n1 = (int64_t)j.n_blocks * (group + 1) / j.n_groups;
    if (n0 == n1) return;
    const int c0 = cc * j.c_tiles * kTile, columns = smaller(j.c_tiles * kTile, j.hidden - c0);
    const int tiles = (columns + kTile - 1) / kTile;
    const size_t tile_bytes = (j.f_chunk + 2) * kLine;
    const int32_t zero_slot = j.f_chunk, side_slot = j.f_chunk + 1;
    char *panel = scratch;
    float *y = (float *)(scratch + panel_bytes(j));
    uint32_t *at = (uint32_t *)((char *)y + round_up((size_t)j.group_tokens * j.c_tiles * kTile * 4, 64));
    char *packed = (char *)at + round_up((j.f_chunk + 4) * sizeof(uint32_t), 64);
    const int64_t first = j.blocks[n0].row0;
    const int group_tokens = (int)(j.blocks[n1 - 1].row0 + j.blocks[n1 - 1].tokens - first);

    for (int c = 0; c < tiles; c++) memset(panel + c * tile_bytes + zero_slot * kLine, 0, kLine);
    for (int c = 0; c < tiles; c++)  // y: [tile][token][column]
      for (int t = 0; t < group_tokens; t++) {
        float *row = y + ((size_t)c * group_tokens + t) * kTile;
        const int n = smaller(kTile, columns - c * kTile);
        if (j.init)
          S::unpack(j.init + (first + t) * j.init_stride + (size_t)(c0 + c * kTile) * S::kInBytes, n, row);
        else
          memset(row, 0, n * 4);
        if (n < kTile) memset(row + n, 0, (kTile - n) * 4);
      }

    for (int fc = 0; fc < j.n_f_chunks; fc++) {
      const int32_t f0 = fc * j.f_chunk, f1 = smaller(f0 + j.f_chunk, j.neurons);
      int missing = f1 - f0;  // neurons of the chunk that are not in the panel yet
      memset(packed, 0, j.f_chunk);

      const bool last = fc + 1 == j.n_f_chunks;  // then the next task begins, with the first chunk of other columns
      const int32_t next0 = last ? 0 : f1;
      const int next_c0 = last ? (task + j.threads) / j.n_groups * j.c_tiles * kTile : c0;
      const int next_rows = n1 - n0 >= kAheadBlocks && next_c0 < j.hidden ? smaller(j.f_chunk, j.neurons - next0) : 0;
      const int64_t row_bytes = (int64_t)smaller(j.c_tiles * kTile, j.hidden - next_c0) * S::kInBytes;
      Ahead next{j.down_t + next0 * j.down_stride + (int64_t)next_c0 * S::kInBytes, j.down_stride, next_rows, row_bytes};
      const int lines = (int)(next_rows * (row_bytes + 63) / 64 / (tiles * (group_tokens / R + n1 - n0))) + 1;

      for (int n = n0; n < n1; n++) {
        const Block &b = j.blocks[n];
        const int from = lower_bound(b.ids, b.k, f0) / P * P;
        int to = lower_bound(b.ids, b.k, f1);
        if (to < b.k) to = to / P * P;
        if (from == to) continue;
        int m = 0, i = from;
        for (; i < to && b.ids[i] < f0; i++) {  // at most P - 1
          pack_down(j, b.ids[i], c0, columns, panel, side_slot);
          at[m++] = side_slot * kLine;
        }
        for (int k = i; k < to && missing; k++) {
          const int32_t slot = b.ids[k] - f0;
          if (packed[slot]) continue;
          packed[slot] = 1;
          missing--;
          pack_down(j, b.ids[k], c0, columns, panel, slot);
        }
        for (; i < to; i++) at[m++] = (b.ids[i] - f0) * kLine;
        if (m % P) at[m++] = zero_slot * kLine;  // the partner of an odd last neuron
        const uint32_t *h = j.h + b.h_at + (size_t)(from / P) * b.padded;
        const int parts = (b.tokens + R - 1) / R;
        for (int c = 0; c < tiles; c++) {
          float *yc = y + ((size_t)c * group_tokens + (b.row0 - first)) * kTile;
          for (int s = 0; s < parts; s++) {  // equal parts of at most R tokens
            const int t0 = b.tokens * s / parts, t1 = b.tokens * (s + 1) / parts;
            next.advance(lines);
            down_tiles<R>(t1 - t0, at, m / P, panel + c * tile_bytes, h + t0, b.padded, yc + (size_t)t0 * kTile);
          }
        }
      }
    }

    for (int t = 0; t < group_tokens; t++)
      for (int c = 0; c < tiles; c++)
        S::pack_out(y + ((size_t)c * group_tokens + t) * kTile, smaller(kTile, columns - c * kTile),
                    j.out + (first + t) * j.out_stride + (size_t)(c0 + c * kTile) * S::kInBytes);
  }

  static constexpr Loops loops() {
    return Loops{{L, P, kTile, S::kDownBytes}, gate_up_bytes, down_bytes, pack_x, gate_up, down};
  }
};

}  // namespace
}  // namespace fastfill
