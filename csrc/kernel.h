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
// - AVX2 has 32 KB of L1 and 16 registers. With 6 tokens x 2 vectors, panels of 32 KB and rows of h of 32 tokens (128 bytes:
//   every other cache set) the second half took 1.3 times as long (Zen 3, fp32, half of 1536 x 8960) as with tiles of 4 x 3,
//   panels of 16 KB and strips of 16 tokens of h. Its tasks are wide, because a row of down costs a visit whatever is read of
//   it: 2 tiles have 0.7 and 32 tiles 1.1 of the speed of 8.
// - Scratch memory in huge pages: 7 to 16 % at 4096 x 14336, nothing on small layers.
//
// With AMX a scheme's tiles (kTiles) multiply; in bf16 isa_amx.cpp has loops of its own.
//
// With int8 weights (kInt8) the same loops sum integers. x is rounded while it is packed; h leaves the first half in fp32 and is
// rounded by a pass of its own, because its scale is known only once a chunk of its neurons is; a block's rows of down are
// interleaved once for all of its tokens.
//
// Every sum runs in the same order whatever the threads: g and u over H in one go, y over chunks whose size depends on
// the shape alone.
#pragma once
#include <cstring>

#include "fastfill.h"
#include "int8.h"
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

// Where the neurons of a chunk [f0, f1) lie in ids[0..k). Whole units only, but at the end: what is left over is done with the
// next chunk.
struct Span {
  int from, to;
};
inline Span span(const int32_t *ids, int k, int32_t f0, int32_t f1, int unit) {
  const auto at = [&](int32_t f) {
    const int i = lower_bound(ids, k, f);
    return i < k ? i / unit * unit : k;  // k: the last unit, whole or not, is done
  };
  return {at(f0), at(f1)};
}

// Where a block's neurons ids[in.from..in.to) lie in a panel of the chunk that begins at f0, in bytes: at[0..m), whole units. What
// the panel lacks goes there first: a chunk's neurons to their own lines, those before it behind the line of zeros. Gives m.
template <class Pack>
inline int panel_lines(const int32_t *ids, Span in, int32_t f0, int32_t f_chunk, int unit, uint32_t line, uint32_t *at, char *packed,
                       int &missing, Pack pack) {
  const int32_t zero_slot = f_chunk, side_slot = f_chunk + 1;
  int m = 0, i = in.from;
  for (; i < in.to && ids[i] < f0; i++, m++) {  // less than a unit
    pack(ids[i], side_slot + m);
    at[m] = (side_slot + m) * line;
  }
  for (int k = i; k < in.to && missing; k++) {
    const int32_t slot = ids[k] - f0;
    if (packed[slot]) continue;
    packed[slot] = 1;
    missing--;
    pack(ids[k], slot);
  }
  for (; i < in.to; i++) at[m++] = (ids[i] - f0) * line;
  while (m % unit) at[m++] = zero_slot * line;  // the partners of the last neuron
  return m;
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
  using Acc = typename S::Acc;  // Vec, or a vector of int32
  static constexpr bool kInt8 = S::kInt8;
  static constexpr int L = S::L, V = S::V, NN = S::NN, N1 = S::N1, P = S::P, R = S::R, C = S::C;
  static constexpr int HP = kInt8 ? 1 : P;  // neurons in a unit of h, as the first half leaves it
  static constexpr int kTile = C * L;  // columns of a tile of the second half
  // Tokens of h that lie together: [strip][unit of neurons][token].
  static constexpr int kStrip = S::kStrip;
  static constexpr int kAheadBlocks = 4;  // with fewer blocks most rows of the next chunk may not be wanted
  static constexpr int kMost = NN > N1 ? NN : N1;
  static_assert(NN % HP == 0 && N1 % HP == 0, "a tile of neurons holds whole units");
  static_assert(kStrip % (V * L) == 0 && (!kInt8 || kStrip == kMaxBlock), "a strip of h holds whole tiles of tokens");

  // The strip of h that token t0 begins; the row of each unit has the strip's tokens.
  static uint32_t *strip_of(const Job &j, const Block &b, int t0) {
    return j.h + b.h_at + (size_t)t0 * ((b.k + HP - 1) / HP);
  }
  static int strip_row(const Block &b, int t0) { return smaller(kStrip, b.padded - t0); }

  // ---- first half: h = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias) -------------------------------------------------------------

  static size_t units(const Job &j) { return round_up((j.hidden + P - 1) / P, S::kRowUnits); }
  // One packed neuron: its gate row, then its up row; 64 bytes more so that rows do not share cache sets.
  static size_t neuron_bytes(const Job &j) { return round_up(units(j) * 8, 64) + 64; }
  // Rows are read where they lie if they are in the form that is multiplied: no widening, no half unit at the end.
  // And if they do not all start in the same few cache sets, as rows of 4 KB do.
  static bool in_place(const Job &j) {
    return S::kInPlace && j.hidden % P == 0 && j.gate_stride == j.up_stride && j.gate_stride % 1024 != 0;
  }
  // Neurons of the chunk, those of the block before it, which of them are there, and their sums.
  static size_t gate_up_bytes(const Job &j) {
    const size_t packed = in_place(j) ? 0 : (j.chunk + kMost) * neuron_bytes(j);
    return packed + (in_place(j) && !kInt8 ? 0 : round_up(j.chunk, 64)) + (kInt8 ? (j.chunk + kMost) * sizeof(Sums) : 0);
  }

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
          if constexpr (kInt8) j.x_scale[b.t_at + t0 + t] = 0;
          continue;
        }
        const char *row = j.x + (b.row0 + t0 + t) * j.x_stride;
        if constexpr (kInt8)
          j.x_scale[b.t_at + t0 + t] = S::pack_token(row, j.hidden, to + t, width, S::kXOffset);
        else
          S::pack_token(row, j.hidden, to + t, width);
      }
      to += nu * width;
    }
  }

  // int8: x comes with kXOffset on each byte, because the instruction wants one factor without sign. So the sums start at
  // -kXOffset times the sum of the neuron's weights.
  struct Sums {
    int32_t gate, up;
  };

  struct Neurons {  // of a tile
    float g[kMost] = {}, u[kMost] = {};  // biases
    float g_scale[kMost], u_scale[kMost];
    Sums sums[kMost];
  };

  // NT neurons by NV vectors of tokens; `up` is the way from a neuron's gate row to its up row.
  template <int NT, int NV>
  static void gate_up_tile(const char *const *rows, uintptr_t up, const Neurons &of, int hidden, size_t nu, const uint32_t *xp,
                           const float *x_scale, int valid, int act, uint32_t *h, size_t h_stride) {
    if constexpr (S::kTiles) {  // sums leave the tiles through memory
      alignas(64) int32_t g[NT * NV * L], u[NT * NV * L];
      S::template rows_by_tokens<NV>(rows, 0, hidden, xp, g);
      S::template rows_by_tokens<NV>(rows, up, hidden, xp, u);
      for (int r = 0; r < valid; r++)
        for (int v = 0; v < NV; v++) {
          const int at = S::template sums_at<NV>(r, v);
          const Vec xs = S::load(x_scale + v * L);
          const Vec gate = S::add(S::mul(S::floats(S::load_sums(g + at)), S::mul(S::all(of.g_scale[r]), xs)), S::all(of.g[r]));
          const Vec value = S::add(S::mul(S::floats(S::load_sums(u + at)), S::mul(S::all(of.u_scale[r]), xs)), S::all(of.u[r]));
          S::store((float *)(h + r * h_stride + v * L), S::mul(S::act(gate, act), value));
        }
    } else {
      gate_up_registers<NT, NV>(rows, up, of, nu, xp, x_scale, valid, act, h, h_stride);
    }
  }

  template <int NT, int NV>
  static void gate_up_registers(const char *const *rows, uintptr_t up, const Neurons &of, size_t nu, const uint32_t *xp,
                                const float *x_scale, int valid, int act, uint32_t *h, size_t h_stride) {
    Acc g[NT][NV], u[NT][NV];
#pragma GCC unroll 16
    for (int r = 0; r < NT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        if constexpr (kInt8)
          g[r][v] = S::all_of(of.sums[r].gate), u[r][v] = S::all_of(of.sums[r].up);
        else
          g[r][v] = S::all(of.g[r]), u[r][v] = S::all(of.u[r]);
      }
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
    // Constant bounds, unrolled: an index that is not known would keep the sums in memory, at half the speed.
    if constexpr (kInt8) {
      Vec xs[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) xs[v] = S::load(x_scale + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < NT; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
          const Vec gate = S::add(S::mul(S::floats(g[r][v]), S::mul(S::all(of.g_scale[r]), xs[v])), S::all(of.g[r]));
          const Vec value = S::add(S::mul(S::floats(u[r][v]), S::mul(S::all(of.u_scale[r]), xs[v])), S::all(of.u[r]));
          if (r < valid) S::store((float *)(h + r * h_stride + v * L), S::mul(S::act(gate, act), value));
        }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < NT; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) g[r][v] = S::mul(S::act(g[r][v], act), u[r][v]);
#pragma GCC unroll 16
      for (int r = 0; r < NT; r += P)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
          if (r < valid)
            S::store_h(h + (r / P) * h_stride + v * L, g[r][v], P == 2 && r + 1 < valid ? g[r + P - 1][v] : S::zero());
    }
  }

  static void pack_neuron(const Job &j, int32_t f, char *to) {
    S::pack_row(j.gate + f * j.gate_stride, j.hidden, to);
    S::pack_row(j.up + f * j.up_stride, j.hidden, to + units(j) * 4);
  }

  static void gate_up(const Job &j, int task, char *scratch) {
    [[maybe_unused]] const typename S::Use use{};
    const int chunk = task / j.n_groups, group = task % j.n_groups;
    const int32_t f0 = chunk * j.chunk, f1 = smaller(f0 + j.chunk, j.neurons);
    const int n0 = (int64_t)j.n_blocks * group / j.n_groups, n1 = (int64_t)j.n_blocks * (group + 1) / j.n_groups;
    const size_t nu = units(j), stride = neuron_bytes(j);
    const bool direct = in_place(j);
    const uintptr_t up = direct ? (uintptr_t)j.up - (uintptr_t)j.gate : nu * 4;  // from a gate row to its up row
    char *side = scratch + j.chunk * stride;  // neurons of the block that lie before this chunk
    char *packed = direct ? scratch : side + kMost * stride;  // which neurons of the chunk are packed already
    if (!direct || kInt8) memset(packed, 0, j.chunk);
    Sums *sums = (Sums *)(packed + round_up(j.chunk, 64)), *side_sums = sums + j.chunk;
    const auto sum = [&](const char *row, Sums &to) {
      if constexpr (kInt8) to = {-S::kXOffset * S::row_sum(row, j.hidden), -S::kXOffset * S::row_sum(row + up, j.hidden)};
    };

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
      const int nt = b.padded == L ? N1 : NN;
      const auto [from, to] = span(b.ids, b.k, f0, f1, nt);
      const uint32_t *xp = j.xp + b.x_at;
      const auto row_of = [&](int i) -> const char * {
        const int32_t f = b.ids[i];
        return direct ? j.gate + f * j.gate_stride : f < f0 ? side + (i - from) * stride : scratch + (f - f0) * stride;
      };
      for (int i = from; i < to && (!direct || kInt8); i++) {
        const int32_t f = b.ids[i];
        if (f >= f0 && packed[f - f0]) continue;
        if (f >= f0) packed[f - f0] = 1;
        if (!direct) pack_neuron(j, f, const_cast<char *>(row_of(i)));
        sum(row_of(i), f < f0 ? side_sums[i - from] : sums[f - f0]);
      }
      for (int t0 = 0; t0 < b.padded; t0 += V * L) {
        const int width = smaller(V * L, b.padded - t0), strip = t0 / kStrip * kStrip, h_row = strip_row(b, strip);
        for (int i = from; i < to; i += nt) {
          const char *rows[kMost];
          Neurons of;
          const int valid = smaller(nt, to - i);
          for (int r = 0; r < nt; r++) {
            const int at = i + smaller(r, valid - 1);
            const int32_t f = b.ids[at];
            rows[r] = row_of(at);
            if (j.gate_bias) S::unpack(j.gate_bias + (size_t)f * S::kTensorBytes, 1, of.g + r);
            if (j.up_bias) S::unpack(j.up_bias + (size_t)f * S::kTensorBytes, 1, of.u + r);
            if constexpr (kInt8) {
              of.g_scale[r] = j.gate_scale[f], of.u_scale[r] = j.up_scale[f];
              of.sums[r] = f < f0 ? side_sums[at - from] : sums[f - f0];
            }
          }
          next_gate.advance(lines);
          next_up.advance(lines);
          uint32_t *h = strip_of(j, b, strip) + (size_t)(i / HP) * h_row + (t0 - strip);
          const float *xs = kInt8 ? j.x_scale + b.t_at + t0 : nullptr;
          if (b.padded == L)
            gate_up_tile<N1, 1>(rows, up, of, j.hidden, nu, xp, xs, valid, j.activation, h, h_row);
          else if (width == V * L)
            gate_up_tile<NN, V>(rows, up, of, j.hidden, nu, xp, xs, valid, j.activation, h, h_row);
          else
            gate_up_narrow<V - 1>(width / L, rows, up, of, j.hidden, nu, xp, xs, valid, j.activation, h, h_row);
        }
        xp += nu * width;
      }
    }
  }

  template <int NV>
  static void gate_up_narrow(int nv, const char *const *rows, uintptr_t up, const Neurons &of, int hidden, size_t nu,
                             const uint32_t *xp, const float *x_scale, int valid, int act, uint32_t *h, size_t h_stride) {
    if constexpr (NV > 0) {
      if (nv == NV)
        gate_up_tile<NN, NV>(rows, up, of, hidden, nu, xp, x_scale, valid, act, h, h_stride);
      else
        gate_up_narrow<NV - 1>(nv, rows, up, of, hidden, nu, xp, x_scale, valid, act, h, h_stride);
    }
  }

  // ---- int8, between the halves: h in eight bits ------------------------------------------------------------------

  // The units of a block's neurons in chunk `fc` that begin at ids[from]; chunks are rounded up to whole units, or tiles.
  static uint32_t *eight_bits(const Job &j, const Block &b, int from, int fc) {
    return j.hq + b.q_at + (size_t)(from / (P * S::kRowUnits) + fc) * S::kRowUnits * b.padded;
  }
  static size_t chunk_token(const Job &j, const Block &b, int fc) { return b.t_at * j.n_f_chunks + (size_t)fc * b.padded; }

  static void quantise_h(const Job &j, int task) {
    const Block &b = j.blocks[task / j.n_f_chunks];
    const int fc = task % j.n_f_chunks;
    const int from = lower_bound(b.ids, b.k, fc * j.f_chunk), to = lower_bound(b.ids, b.k, smaller((fc + 1) * j.f_chunk, j.neurons));
    if (from == to) return;
    const float *h = (const float *)(j.h + b.h_at) + (size_t)from * b.padded;
    uint32_t *q = eight_bits(j, b, from, fc);
    const size_t at = chunk_token(j, b, fc);
    for (int t0 = 0; t0 < b.padded; t0 += L) {
      Vec top = S::zero();
      for (int i = 0; i < to - from; i++) top = S::top_bits(top, S::load(h + (size_t)i * b.padded + t0));
      float lanes[L], inverse[L];
      S::store(lanes, top);
      for (int t = 0; t < L; t++) {
        uint32_t bits;
        memcpy(&bits, lanes + t, 4);
        const Quantiser by = quantiser(bits);
        j.h_scale[at + t0 + t] = by.scale, inverse[t] = by.inverse;
      }
      const Vec inv = S::load(inverse);
      Acc sum = S::all_of(0);
      [[maybe_unused]] Acc tile[S::kRowUnits];
      for (int i = 0; i < to - from; i += P) {
        Vec part[P];
        for (int p = 0; p < P; p++)
          part[p] = i + p < to - from ? S::mul(S::load(h + (size_t)(i + p) * b.padded + t0), inv) : S::zero();
        if constexpr (S::kTiles)
          S::store_tile_unit(tile, i / P, i + P >= to - from, q + t0 * round_up((to - from + P - 1) / P, S::kRowUnits), part, sum);
        else
          S::store_unit(q + (size_t)(i / P) * b.padded + t0, part, sum);
      }
      S::store_sums(j.h_start + at + t0, sum);
      for (int t = 0; t < L; t++) {  // without sign, because a sum with NaN is anything
        int32_t &start = j.h_start[at + t0 + t];
        start = (int32_t)((uint32_t)-S::kDownOffset * (uint32_t)start);
      }
    }
  }

  // ---- second half: y = init + h @ down_t -----------------------------------------------------------------------

  static constexpr size_t kLine = kTile * S::kDownBytes;  // one neuron's part of a column tile
  static size_t panel_bytes(const Job &j) { return round_up((j.f_chunk + 2) * kLine * j.c_tiles, 64); }
  static constexpr size_t kUnits = C * L * 4;  // bytes of one unit of int8 neurons by one column tile
  static size_t down_bytes(const Job &j) {
    const size_t y = (size_t)j.group_tokens * j.c_tiles * kTile * 4;
    return panel_bytes(j) + round_up(y, 64) + round_up((j.f_chunk + P * S::kRowUnits) * sizeof(uint32_t), 64) + round_up(j.f_chunk, 64) +
           (kInt8 ? (j.f_chunk / P + S::kRowUnits) * kUnits : 0);
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

  // The same for int8: `units` of neurons by columns lie one behind the other, and y += scale times the sums.
  template <int NR>
  static void down_tile_int8(const char *units, int n_units, const uint32_t *h, size_t h_stride, const int32_t *start,
                             const float *scale, float *y) {
    Acc acc[NR][C];
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) acc[r][c] = S::all_of(start[r]);
    for (int r = 0; r < NR * C; r++) prefetch((const char *)(y + r * L));
    for (int i = 0; i < n_units; i++, units += kUnits, h += h_stride) {
      typename S::Unit d[C];
      for (int c = 0; c < C; c++) d[c] = S::load_unit((const uint32_t *)units + c * L);
#pragma GCC unroll 16
      for (int r = 0; r < NR; r++) {
        const auto hb = S::broadcast(h + r);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = S::dot_down(acc[r][c], d[c], hb);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        float *to = y + r * kTile + c * L;
        S::store(to, S::add(S::load(to), S::mul(S::floats(acc[r][c]), S::all(scale[r]))));
      }
  }

  template <int NR>
  static void down_tiles_int8(int nr, const char *units, int n_units, const uint32_t *h, size_t h_stride,
                              const int32_t *start, const float *scale, float *y) {
    if constexpr (NR > 0) {
      if (nr == NR)
        down_tile_int8<NR>(units, n_units, h, h_stride, start, scale, y);
      else
        down_tiles_int8<NR - 1>(nr, units, n_units, h, h_stride, start, scale, y);
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
    [[maybe_unused]] const typename S::Use use{};
    const int cc = task / j.n_groups, group = task % j.n_groups;
    const int n0 = (int64_t)j.n_blocks * group / j.n_groups, n1 = (int64_t)j.n_blocks * (group + 1) / j.n_groups;
    if (n0 == n1) return;
    const int c0 = cc * j.c_tiles * kTile, columns = smaller(j.c_tiles * kTile, j.hidden - c0);
    const int tiles = (columns + kTile - 1) / kTile;
    const size_t tile_bytes = (j.f_chunk + 2) * kLine;
    const int32_t zero_slot = j.f_chunk;
    char *panel = scratch;
    float *y = (float *)(scratch + panel_bytes(j));
    uint32_t *at = (uint32_t *)((char *)y + round_up((size_t)j.group_tokens * j.c_tiles * kTile * 4, 64));
    char *packed = (char *)at + round_up((j.f_chunk + P * S::kRowUnits) * sizeof(uint32_t), 64);
    [[maybe_unused]] char *units = packed + round_up(j.f_chunk, 64);  // int8: a block's neurons in one tile of columns
    const int64_t first = j.blocks[n0].row0;
    const int group_tokens = (int)(j.blocks[n1 - 1].row0 + j.blocks[n1 - 1].tokens - first);

    for (int c = 0; c < tiles; c++) memset(panel + c * tile_bytes + zero_slot * kLine, 0, kLine);
    for (int c = 0; c < tiles; c++)  // y: [tile][token][column]
      for (int t = 0; t < group_tokens; t++) {
        float *row = y + ((size_t)c * group_tokens + t) * kTile;
        const int n = smaller(kTile, columns - c * kTile);
        if (j.init && !kInt8)
          S::unpack(j.init + (first + t) * j.init_stride + (size_t)(c0 + c * kTile) * S::kTensorBytes, n, row);
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
        const Span in = span(b.ids, b.k, f0, f1, HP);
        const int from = in.from;
        if (from == in.to) continue;
        const int m = panel_lines(b.ids, in, f0, j.f_chunk, P * S::kRowUnits, kLine, at, packed, missing,
                                  [&](int32_t f, int32_t slot) { pack_down(j, f, c0, columns, panel, slot); });
        for (int c = 0; c < tiles; c++) {
          const char *lines_of = panel + c * tile_bytes;
          if constexpr (kInt8)  // once per block: in each tile of tokens it would be a third of the instructions
            for (int u = 0; u < m / P; u++) {
              const char *rows[P];
              for (int p = 0; p < P; p++) rows[p] = lines_of + at[u * P + p];
              S::interleave(rows, units + u * kUnits);
            }
          if constexpr (S::kTiles) {
            float *to = y + ((size_t)c * group_tokens + (b.row0 - first)) * kTile;
            S::add_down(units, m / P, eight_bits(j, b, from, fc), b.tokens, j.h_scale + chunk_token(j, b, fc), to);
            next.advance(lines * (b.tokens / R + 1));
            continue;
          }
          for (int strip = 0; strip < b.tokens; strip += kStrip) {
            const int row = strip_row(b, strip), tokens = smaller(kStrip, b.tokens - strip), parts = (tokens + R - 1) / R;
            const uint32_t *h = kInt8 ? eight_bits(j, b, from, fc) : strip_of(j, b, strip) + (size_t)(from / HP) * row;
            float *ys = y + ((size_t)c * group_tokens + (b.row0 - first) + strip) * kTile;
            for (int s = 0; s < parts; s++) {  // equal parts of at most R tokens
              const int t0 = tokens * s / parts, t1 = tokens * (s + 1) / parts;
              next.advance(lines);
              float *yt = ys + (size_t)t0 * kTile;
              if constexpr (kInt8) {
                const size_t of = chunk_token(j, b, fc) + t0;
                down_tiles_int8<R>(t1 - t0, units, m / P, h + t0, row, j.h_start + of, j.h_scale + of, yt);
              } else {
                down_tiles<R>(t1 - t0, at, m / P, lines_of, h + t0, row, yt);
              }
            }
          }
        }
      }
    }

    for (int t = 0; t < group_tokens; t++)
      for (int c = 0; c < tiles; c++) {
        float *row = y + ((size_t)c * group_tokens + t) * kTile;
        const int n = smaller(kTile, columns - c * kTile), column = c0 + c * kTile;
        if constexpr (kInt8) {
          float sum[kTile] = {};
          if (j.init) S::unpack(j.init + (first + t) * j.init_stride + (size_t)column * S::kTensorBytes, n, sum);
          for (int i = 0; i < n; i++) row[i] = row[i] * j.down_scale[column + i] + sum[i];
        }
        S::pack_out(row, n, j.out + (first + t) * j.out_stride + (size_t)column * S::kTensorBytes);
      }
  }

  static constexpr Loops loops() {
    constexpr Sizes sizes{L, P, P * S::kRowUnits, kTile, S::kDownBytes, S::kChunk, S::kPanel, S::kMostTiles, S::kNarrow};
    if constexpr (kInt8)
      return Loops{sizes, gate_up_bytes, down_bytes, pack_x, gate_up, S::round_row, quantise_h, down};
    else
      return Loops{sizes, gate_up_bytes, down_bytes, pack_x, gate_up, nullptr, nullptr, down};
  }
};

}  // namespace
}  // namespace fastfill
