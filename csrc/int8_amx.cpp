// Eight bits on AMX (tiles.h): both factors have signs, so that nothing is added to them.
#include "int8_avx512.h"
#include "kernel.h"
#include "tiles.h"

namespace fastfill {
namespace {

template <class Store>
struct AmxInt8 : Avx512Int8<Store> {
  using Base = Avx512Int8<Store>;
  using Vec = typename Base::Vec;
  using Acc = typename Base::Acc;
  using Use = tiles::Use;
  using Base::C, Base::L, Base::P;
  static constexpr int NN = 2 * tiles::kRows, N1 = NN, kRowUnits = tiles::kRows;
  static constexpr bool kTiles = true;
  static constexpr int kXOffset = 0, kDownOffset = 0;
  static constexpr int kChunk = 1024 * 1024;

  static Acc load_sums(const int32_t *p) { return _mm512_load_si512(p); }
  template <int NV>
  static constexpr int sums_at(int row, int v) {
    return tiles::sums_at<NV>(row, v);
  }
  template <int NV>
  static void rows_by_tokens(const char *const *rows, uintptr_t offset, int hidden, const uint32_t *x, int32_t *sums) {
    alignas(64) char ring[tiles::kRing * tiles::kSlot];
    Ahead none{nullptr, 0, 0, 0};
    tiles::rows_by_tokens<tiles::Bytes, NV, true>(rows, offset, hidden, {ring, tiles::kRing - 1}, x, none, 0, sums);
  }

  // h leaves as tiles: [step of 16 units][token][unit].
  static void store_tile_unit(Acc *tile, int unit, bool last, uint32_t *to, const Vec *part, Acc &sum) {
    uint32_t four[L];
    Base::store_unit(four, part, sum);
    tile[unit % tiles::kRows] = _mm512_loadu_si512(four);
    if (last)
      for (int u = unit % tiles::kRows + 1; u < tiles::kRows; u++) tile[u] = _mm512_setzero_si512();
    if (!last && unit % tiles::kRows != tiles::kRows - 1) return;
    tiles::transpose(tile);
    for (int t = 0; t < L; t++) _mm512_storeu_si512(to + (size_t)unit / tiles::kRows * 256 + t * L, tile[t]);
  }

  // Down's bytes as they are: both factors have signs.
  static void pack_down(const char *from, int n, char *to) {
    Base::pack_down(from, n, to);
    _mm512_storeu_si512(to, _mm512_xor_si512(_mm512_loadu_si512(to), _mm512_set1_epi8((char)0x80)));
  }

  // y[token][64] += scale of the token times (h @ units), of all tokens of a block: `units` as interleave leaves them.
  static void add_down(const char *units, int n_units, const uint32_t *h, int tokens, const float *scale, float *y) {
    constexpr int kUnit = C * L * 4, kTile = C * L;
    const int n_steps = n_units / tiles::kRows;
    const size_t h_stride = (size_t)n_steps * tiles::kBytes;
    alignas(64) int32_t sums[4][256];
    for (int t0 = 0; t0 < tokens; t0 += 2 * L) {
      const char *a = (const char *)h + t0 / L * h_stride;
      const bool two = tokens - t0 > L;
      for (int c = 0; c < C; c += 2) {
        tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
        for (int s = 0; s < n_steps; s++) {
          const char *b = units + (size_t)s * tiles::kRows * kUnit + c * 64;
          tiles::load<4>(a + s * tiles::kBytes), tiles::load<6>(b, kUnit);
          tiles::Bytes::dot<0, 4, 6>();
          tiles::load<7>(b + 64, kUnit), tiles::Bytes::dot<1, 4, 7>();
          if (two) tiles::load<5>(a + h_stride + s * tiles::kBytes), tiles::Bytes::dot<2, 5, 6>(), tiles::Bytes::dot<3, 5, 7>();
        }
        tiles::store<0>(sums[0]), tiles::store<1>(sums[1]);
        if (two) tiles::store<2>(sums[2]), tiles::store<3>(sums[3]);
        for (int t = 0; t < 2 * L && t0 + t < tokens; t++)
          for (int k = 0; k < 2; k++) {
            float *to = y + (size_t)(t0 + t) * kTile + (c + k) * L;
            const Vec of = Base::mul(Base::floats(load_sums(sums[t / L * 2 + k] + t % L * L)), Base::all(scale[t0 + t]));
            Base::store(to, Base::add(Base::load(to), of));
          }
      }
    }
  }
};

}  // namespace
const Loops amx_int8_f32 = Ffn<AmxInt8<F32>>::loops(), amx_int8_bf16 = Ffn<AmxInt8<Bf16ViaF32>>::loops();
}  // namespace fastfill
