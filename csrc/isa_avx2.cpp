// AVX2 + FMA: fp32, and bf16 widened to fp32. 16 registers: 12 sums (3 neurons x gate, up x 2 vectors of tokens, or
// 4 tokens x 3 vectors of columns), the vectors and a broadcast.
#include "avx2.h"
#include "kernel.h"
#include "low_rank.h"
#include "top_k.h"

namespace fastfill {
namespace {

template <class Store>
struct Avx2F32 : Avx2, Store {
  using Unit = __m256;
  using Acc = Vec;
  static constexpr int V = 2, NN = 3, N1 = 4, P = 1, R = 4, C = 3;
  // For 32 KB of L1: half of the panel and a strip's rows of h, a cache line each, fit together.
  static constexpr int kStrip = 16, kPanel = 16 * 1024, kMostTiles = kAllTiles;
  static constexpr float kNarrow = 1;
  static Unit load_unit(const uint32_t *p) { return _mm256_loadu_ps((const float *)p); }
  static Vec broadcast(const void *p) {
    float f;
    memcpy(&f, p, 4);
    return _mm256_set1_ps(f);
  }
  static Vec dot(Vec acc, Unit a, Vec b) { return _mm256_fmadd_ps(a, b, acc); }
  static void load_down(const char *a, const char *, Unit *d) {
    for (int c = 0; c < C; c++) d[c] = _mm256_loadu_ps((const float *)a + c * L);
  }
  static void pack_down(const char *from, int n, char *to) { Store::pack_down(from, n, to, C * L); }
  static void store_h(uint32_t *to, Vec a, Vec) { _mm256_storeu_ps((float *)to, a); }
};

template <class Store>
struct Avx2LowRank : Avx2F32<Store> {  // ranks are multiples of 16, not of 24: 5 % faster so
  static constexpr int R = 6, C = 2;
};

}  // namespace
const Scheme avx2_f32{Ffn<Avx2F32<F32>>::loops(), LowRank<Avx2LowRank<F32>>::loops()};
const Scheme avx2_bf16_via_f32{Ffn<Avx2F32<Bf16ViaF32>>::loops(), LowRank<Avx2LowRank<Bf16ViaF32>>::loops()};
void avx2_top_k(const TopKJob &j, int row, char *scratch) { top_k(j, row, scratch); }
}  // namespace fastfill
