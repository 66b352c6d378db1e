// AMX in bf16 (tiles.h). The passes are those of kernel.h:
//
// 1. pack_x turns tokens around: a tile of x has 16 tokens side by side, and below each other 16 pairs of its columns.
// 2. gate_up: 32 selected neurons x 32 tokens are four sums in tiles, gate first, then up. h = act(g) * u leaves as tiles of 16
//    tokens with 32 neurons each.
// 3. down: 32 tokens x 32 columns are four sums; two selected neurons' columns are interleaved while they are copied.
//
// Emerald Rapids, one core, 2026-11-28: tile products run at 3.0 TFLOP/s in L1 and at 2.2 from L2; half of 1536 x 8960 in blocks of
// 32 tokens at 0.65, because a copied line is used for 32 tokens alone. Without the copies the first half takes half of its time.
//
// Rounding is to nearest, denormals count as zero.
#include "avx512_bf16.h"
#include "kernel.h"
#include "low_rank.h"
#include "tiles.h"

namespace fastfill {
namespace {

struct AmxBf16 {
  static constexpr int L = Avx512::L, kRows = tiles::kRows, kStep = 32;  // kStep: bf16 in a row of a tile
  static constexpr int kColumns = 2 * L;      // of a tile of the second half
  static constexpr size_t kLine = 64;         // one neuron's part of it
  static int steps(const Job &j) { return (j.hidden + kStep - 1) / kStep; }
  static int groups(const Block &b) { return (b.k + kStep - 1) / kStep; }  // of neurons, a tile of h each
  static __mmask32 tail(int n) { return n >= kStep ? 0xffffffffu : (1u << n) - 1; }

  // ---- x: [strip of 32 tokens][pair of columns][token], absent ones zero -----------------------------------------

  static void pack_x(const Job &j, int n) {
    const Block &b = j.blocks[n];
    uint32_t *to = j.xp + b.x_at;
    for (int t0 = 0; t0 < b.padded; t0 += L) {
      const int width = smaller(2 * L, b.padded - t0 / (2 * L) * (2 * L));
      uint32_t *tile = to + (size_t)t0 / (2 * L) * (2 * L) * steps(j) * kRows + t0 % (2 * L);
      for (int s = 0; s < steps(j); s++) {
        const __mmask32 mask = tail(j.hidden - s * kStep);
        __m512i v[L];
#pragma GCC unroll 16
        for (int t = 0; t < L; t++)
          v[t] = t0 + t < b.tokens
                     ? _mm512_maskz_loadu_epi16(mask, j.x + (b.row0 + t0 + t) * j.x_stride + (size_t)s * kStep * 2)
                     : _mm512_setzero_si512();
        tiles::transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++, tile += width) _mm512_store_si512(tile, v[i]);
      }
    }
  }

  // ---- first half -----------------------------------------------------------------------------------------------------

  struct Neurons {
    float g[2 * kRows] = {}, u[2 * kRows] = {};  // biases
    int valid;
  };

  // 1 / (1 + exp(-z)), relative error below 2^-13 where h is rounded to 2^-9. The clamps keep NaN and still reach 0 and 1.
  static __m512 sigmoid(__m512 z) {
    z = _mm512_mul_ps(z, _mm512_set1_ps(-1.44269504f));
    z = _mm512_min_ps(_mm512_set1_ps(129.0f), _mm512_max_ps(_mm512_set1_ps(-150.0f), z));
    const __m512 n = _mm512_roundscale_ps(z, 8), r = _mm512_sub_ps(z, n);
    __m512 p = _mm512_set1_ps(0.0096181291f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0555041087f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.2402265070f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931471806f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n)));
  }

  template <int kKind>
  static __m512 act(__m512 g) {
    if (kKind == FASTFILL_SILU) return _mm512_mul_ps(g, sigmoid(g));
    if (kKind == FASTFILL_GELU_TANH) {
      const __m512 square = _mm512_mul_ps(g, g), slope = _mm512_set1_ps(1.5957691216f);
      return _mm512_mul_ps(g, sigmoid(_mm512_mul_ps(g, _mm512_fmadd_ps(square, _mm512_set1_ps(0.0713548163f), slope))));
    }
    return Avx512::act(g, kKind);
  }

  // h of 16 tokens: a tile of tokens with 32 neurons each.
  template <int kKind, int NV>
  static void activate(const float *g, const float *u, int v, const Neurons &of, char *h) {
    __m512i pairs[L];
#pragma GCC unroll 2
    for (int i = 0; i < L; i++) {
      __m512 two[2];
      for (int p = 0; p < 2; p++) {
        const int r = 2 * i + p, at = tiles::sums_at<NV>(r, v);
        two[p] = _mm512_mul_ps(act<kKind>(_mm512_add_ps(_mm512_load_ps(g + at), _mm512_set1_ps(of.g[r]))),
                               _mm512_add_ps(_mm512_load_ps(u + at), _mm512_set1_ps(of.u[r])));
        if (r >= of.valid) two[p] = _mm512_setzero_ps();
      }
      // bf16 of the first in the low halves
      pairs[i] = _mm512_permutexvar_epi16(order(), (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0]));
    }
    tiles::transpose(pairs);
    for (int t = 0; t < L; t++) _mm512_store_si512(h + t * 64, pairs[t]);
  }
  static __m512i order() {
    alignas(64) static constexpr uint16_t to[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_load_si512(to);
  }

  template <int NV>
  static void activate(int kind, const float *g, const float *u, int v, const Neurons &of, char *h) {
    if (kind == FASTFILL_SILU) return activate<FASTFILL_SILU, NV>(g, u, v, of, h);
    if (kind == FASTFILL_GELU_TANH) return activate<FASTFILL_GELU_TANH, NV>(g, u, v, of, h);
    if (kind == FASTFILL_RELU) return activate<FASTFILL_RELU, NV>(g, u, v, of, h);
    activate<FASTFILL_GELU, NV>(g, u, v, of, h);
  }

  static size_t gate_up_bytes(const Job &j) { return 2 * tiles::ring_bytes(steps(j)) + 2 * 4 * tiles::kBytes; }

  static void gate_up(const Job &j, int task, char *scratch) {
    const tiles::Use use;
    const int chunk = task / j.n_groups, group = task % j.n_groups;
    const int32_t f0 = chunk * j.chunk, f1 = smaller(f0 + j.chunk, j.neurons);
    const int n0 = (int64_t)j.n_blocks * group / j.n_groups, n1 = (int64_t)j.n_blocks * (group + 1) / j.n_groups;
    const int n_steps = steps(j);
    const int64_t row_bytes = (int64_t)j.hidden * 2;
    const size_t ring_bytes = tiles::ring_bytes(n_steps);
    float *g = (float *)(scratch + 2 * ring_bytes), *u = g + 4 * 256;

    for (int n = n0; n < n1; n++) {
      const Block &b = j.blocks[n];
      const auto [from, to] = span(b.ids, b.k, f0, f1, kStep);
      const int mask = b.padded > 2 * L ? tiles::power_of_two(n_steps) - 1 : tiles::kRing - 1;
      // The next block's x comes from L3 meanwhile. Asking for the next chunk of weights, too, costs more than it gains.
      const Block &after = j.blocks[n + 1 < n1 ? n + 1 : n0];
      const int64_t x_bytes = (int64_t)after.padded * n_steps * 64;
      Ahead next{(const char *)(j.xp + after.x_at), 0, 1, x_bytes};
      const int64_t steps_to_come =
          (int64_t)(to - from + kStep - 1) / kStep * 2 * ((b.padded + 2 * L - 1) / (2 * L)) * n_steps;
      const int lines = (int)(x_bytes / 64 / (steps_to_come + 1)) + 1;
      for (int i = from; i < to; i += kStep) {
        const char *gates[kStep], *ups[kStep];
        Neurons of;
        of.valid = smaller(kStep, to - i);
        for (int r = 0; r < kStep; r++) {
          const int32_t f = b.ids[i + smaller(r, of.valid - 1)];
          gates[r] = j.gate + f * j.gate_stride, ups[r] = j.up + f * j.up_stride;
          if (j.gate_bias) Bf16ViaF32::unpack(j.gate_bias + (size_t)f * 2, 1, of.g + r);
          if (j.up_bias) Bf16ViaF32::unpack(j.up_bias + (size_t)f * 2, 1, of.u + r);
        }
        const uint32_t *x = j.xp + b.x_at;
        for (int t0 = 0; t0 < b.padded; t0 += 2 * L, x += (size_t)2 * L * n_steps * kRows) {
          const bool two = b.padded - t0 > L, copy = t0 == 0;
          using tiles::Bf16, tiles::rows_by_tokens;
          const auto multiply = two ? copy ? rows_by_tokens<Bf16, 2, true> : rows_by_tokens<Bf16, 2, false>
                                    : copy ? rows_by_tokens<Bf16, 1, true> : rows_by_tokens<Bf16, 1, false>;
          multiply(gates, 0, row_bytes, {scratch, mask}, x, next, lines, g);
          multiply(ups, 0, row_bytes, {scratch + ring_bytes, mask}, x, next, lines, u);
          for (int v = 0; v <= two; v++) {
            char *h = h_tile(j, b, t0 / L + v, i / kStep);
            two ? activate<2>(j.activation, g, u, v, of, h) : activate<1>(j.activation, g, u, v, of, h);
          }
        }
      }
    }
  }

  // h: [16 tokens][32 neurons][token][neuron]
  static char *h_tile(const Job &j, const Block &b, int tokens, int group) {
    return (char *)(j.h + b.h_at) + ((size_t)tokens * groups(b) + group) * tiles::kBytes;
  }

  // ---- second half: y = init + h @ down_t -----------------------------------------------------------------------

  static size_t tile_bytes(const Job &j) { return (size_t)(j.f_chunk + kStep) * kLine; }
  static int most_tokens(const Job &j) {  // of a group, with those that fill its blocks
    int most = 0;
    for (int64_t g = 0; g < j.n_groups; g++) {
      const Block &a = j.blocks[j.n_blocks * g / j.n_groups], &z = j.blocks[j.n_blocks * (g + 1) / j.n_groups - 1];
      const int tokens = (int)(z.t_at + z.padded - a.t_at);
      most = tokens > most ? tokens : most;
    }
    return most;
  }
  static size_t down_bytes(const Job &j) {
    const size_t y = (size_t)most_tokens(j) * j.c_tiles * kColumns * 4;
    return tile_bytes(j) * j.c_tiles + y + round_up((j.f_chunk + 2 * kStep) * sizeof(uint32_t), 64) + round_up(j.f_chunk, 64) +
           tiles::ring_bytes(j.f_chunk / kStep + 2);
  }

  static void interleave_step(const char *panel, const uint32_t *at, char *to) {
#pragma GCC unroll 16
    for (int q = 0; q < kRows; q++) {
      const __m512i a = _mm512_load_si512(panel + at[2 * q]), b = _mm512_load_si512(panel + at[2 * q + 1]);
      _mm512_store_si512(to + q * 64, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + tiles::kBytes + q * 64, _mm512_unpackhi_epi16(a, b));
    }
  }

  // y += h @ rows of the panel, of NT tiles of tokens. Without kCopy the rows are in the ring already.
  template <bool kCopy, int NT>
  static void add_down(const char *h, size_t h_stride, const char *panel, const uint32_t *at, int n_steps, char *ring, int mask,
                       float *y) {
    constexpr int kRow = kColumns * 4;
    if (kCopy)
      for (int s = 0; s < tiles::kDepth && s < n_steps; s++)
        interleave_step(panel, at + s * kStep, ring + (s & mask) * tiles::kSlot);
    tiles::load<0>(y, kRow), tiles::load<1>(y + L, kRow);
    if (NT == 2) tiles::load<2>(y + L * kColumns, kRow), tiles::load<3>(y + L * kColumns + L, kRow);
    for (int s = 0; s < n_steps; s++, h += tiles::kBytes) {
      const char *b = ring + (s & mask) * tiles::kSlot;
      tiles::load<4>(h), tiles::load<6>(b);
      tiles::Bf16::dot<0, 4, 6>();
      tiles::load<7>(b + tiles::kBytes);
      tiles::Bf16::dot<1, 4, 7>();
      if (NT == 2) tiles::load<5>(h + h_stride), tiles::Bf16::dot<2, 5, 6>(), tiles::Bf16::dot<3, 5, 7>();
      if (kCopy && s + tiles::kDepth < n_steps)
        interleave_step(panel, at + (s + tiles::kDepth) * kStep, ring + ((s + tiles::kDepth) & mask) * tiles::kSlot);
    }
    tiles::store<0>(y, kRow), tiles::store<1>(y + L, kRow);
    if (NT == 2) tiles::store<2>(y + L * kColumns, kRow), tiles::store<3>(y + L * kColumns + L, kRow);
  }

  // Columns [c0, c0 + columns) of one neuron into its line of every tile of the panel.
  static void pack_down(const Job &j, int32_t f, int c0, int columns, char *panel, size_t slot) {
    const char *from = j.down_t + f * j.down_stride + (size_t)c0 * 2;
    for (int c = 0; c < columns; c += kColumns, panel += tile_bytes(j))
      Avx512Bf16::pack_down(from + (size_t)c * 2, smaller(kColumns, columns - c), panel + slot * kLine);
  }

  static void down(const Job &j, int task, char *scratch) {
    const tiles::Use use;
    const int cc = task / j.n_groups, group = task % j.n_groups;
    const int n0 = (int64_t)j.n_blocks * group / j.n_groups, n1 = (int64_t)j.n_blocks * (group + 1) / j.n_groups;
    if (n0 == n1) return;
    const int c0 = cc * j.c_tiles * kColumns, columns = smaller(j.c_tiles * kColumns, j.hidden - c0);
    const int n_tiles = (columns + kColumns - 1) / kColumns;
    const int32_t zero_slot = j.f_chunk;
    const size_t first = j.blocks[n0].t_at, tokens = j.blocks[n1 - 1].t_at + j.blocks[n1 - 1].padded - first;
    char *panel = scratch;
    float *y = (float *)(panel + tile_bytes(j) * j.c_tiles);  // [tile][token][column]
    char *ring = (char *)(y + tokens * j.c_tiles * kColumns);
    uint32_t *at = (uint32_t *)(ring + tiles::ring_bytes(j.f_chunk / kStep + 2));
    char *packed = (char *)at + round_up((j.f_chunk + 2 * kStep) * sizeof(uint32_t), 64);
    const auto y_row = [&](int tile, const Block &b, int t) { return y + (tile * tokens + b.t_at - first + t) * kColumns; };

    for (int c = 0; c < n_tiles; c++) {
      memset(panel + c * tile_bytes(j) + zero_slot * kLine, 0, kLine);
      const int n = smaller(kColumns, columns - c * kColumns);
      for (int i = n0; i < n1; i++)
        for (int t = 0; t < j.blocks[i].padded; t++) {
          const Block &b = j.blocks[i];
          float *row = y_row(c, b, t);
          memset(row, 0, kColumns * 4);
          if (j.init && t < b.tokens)
            Bf16ViaF32::unpack(j.init + (b.row0 + t) * j.init_stride + (size_t)(c0 + c * kColumns) * 2, n, row);
        }
    }

    for (int fc = 0; fc < j.n_f_chunks; fc++) {
      const int32_t f0 = fc * j.f_chunk, f1 = smaller(f0 + j.f_chunk, j.neurons);
      int missing = f1 - f0;  // neurons of the chunk that are not in the panel yet
      memset(packed, 0, j.f_chunk);
      for (int n = n0; n < n1; n++) {
        const Block &b = j.blocks[n];
        const Span in = span(b.ids, b.k, f0, f1, kStep);
        if (in.from == in.to) continue;
        const int m = panel_lines(b.ids, in, f0, j.f_chunk, kStep, kLine, at, packed, missing,
                                  [&](int32_t f, int32_t slot) { pack_down(j, f, c0, columns, panel, slot); });
        const int n_steps = m / kStep, mask = b.padded > 2 * L ? tiles::power_of_two(n_steps) - 1 : tiles::kRing - 1;
        const size_t h_stride = groups(b) * tiles::kBytes;
        for (int c = 0; c < n_tiles; c++) {
          const char *lines_of = panel + c * tile_bytes(j);
          for (int t0 = 0; t0 < b.padded; t0 += 2 * L) {
            const char *h = h_tile(j, b, t0 / L, in.from / kStep);
            float *to_y = y_row(c, b, t0);
            const bool two = b.padded - t0 > L;
            if (t0 == 0)
              two ? add_down<true, 2>(h, h_stride, lines_of, at, n_steps, ring, mask, to_y)
                  : add_down<true, 1>(h, h_stride, lines_of, at, n_steps, ring, mask, to_y);
            else
              two ? add_down<false, 2>(h, h_stride, lines_of, at, n_steps, ring, mask, to_y)
                  : add_down<false, 1>(h, h_stride, lines_of, at, n_steps, ring, mask, to_y);
          }
        }
      }
    }

    for (int i = n0; i < n1; i++)
      for (int t = 0; t < j.blocks[i].tokens; t++)
        for (int c = 0; c < n_tiles; c++) {
          const int column = c0 + c * kColumns;
          Avx512Bf16::pack_out(y_row(c, j.blocks[i], t), smaller(kColumns, j.hidden - column),
                                j.out + (j.blocks[i].row0 + t) * j.out_stride + (size_t)column * 2);
        }
  }

  static constexpr Loops loops() {
    constexpr Sizes sizes{L, 2, kStep, kColumns, 2, 1024 * 1024, 128 * 1024, 8, 0.08f};
    return Loops{sizes, gate_up_bytes, down_bytes, pack_x, gate_up, nullptr, nullptr, down};
  }
};

// The predictor's and the compensator's products.
struct AmxLowRank : Avx512Bf16 {
  static constexpr int R = 2 * tiles::kRows, kRowUnits = tiles::kRows;
  static constexpr bool kTiles = true;
  using Use = tiles::Use;

  // out[r][0..n_tiles * 32) = rows[r] @ panels + bias. Reads 32 rows, or 16.
  static void multiply(int nr, const char *rows, size_t apart, size_t nu, const char *panels, int n_tiles, const float *bias,
                       float *out, size_t stride) {
    const bool two = nr > tiles::kRows;
    constexpr int kPanel = C * L * 4;  // bytes of a unit
    for (int tile = 0; tile < n_tiles; tile++, out += C * L) {
      tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
      for (size_t i = 0; i < nu; i += tiles::kRows, panels += tiles::kRows * kPanel) {
        tiles::load<4>(rows + i * 4, apart), tiles::load<6>(panels, kPanel);
        tiles::Bf16::dot<0, 4, 6>();
        tiles::load<7>(panels + 64, kPanel), tiles::Bf16::dot<1, 4, 7>();
        if (two) tiles::load<5>(rows + tiles::kRows * apart + i * 4, apart), tiles::Bf16::dot<2, 5, 6>(), tiles::Bf16::dot<3, 5, 7>();
      }
      alignas(64) float sums[4][256];
      tiles::store<0>(sums[0]), tiles::store<1>(sums[1]);
      if (two) tiles::store<2>(sums[2]), tiles::store<3>(sums[3]);
      for (int c = 0; c < C; c++) {
        const Vec plus = bias ? load(bias + tile * C * L + c * L) : zero();
        for (int r = 0; r < nr; r++) store(out + r * stride + c * L, add(load(sums[r / 16 * 2 + c] + r % 16 * L), plus));
      }
    }
  }
};

}  // namespace
const Scheme amx_bf16{AmxBf16::loops(), LowRank<AmxLowRank>::loops()};
}  // namespace fastfill
