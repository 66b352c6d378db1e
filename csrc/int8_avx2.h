// Eight bits in 256-bit registers: what AVX-VNNI and AVX2 share.
#pragma once
#include "avx2.h"
#include "int8.h"

namespace fastfill {
namespace {

template <class Store, int kOffset>  // kOffset: what is added to the bytes of x and of down
struct Avx2Int8 : Avx2, Int8<Store> {
  using Unit = __m256i;
  using Acc = __m256i;
  static constexpr int V = 2, NN = 3, N1 = 4, P = 4, R = 6, C = 2;
  static constexpr int kXOffset = kOffset, kDownOffset = kOffset, kMostTiles = kAllTiles;
  static constexpr float kNarrow = 1;

  static Acc all_of(int32_t n) { return _mm256_set1_epi32(n); }
  static Vec floats(Acc a) { return _mm256_cvtepi32_ps(a); }
  static Unit load_unit(const uint32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
  static Unit broadcast(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }

  static Vec top_bits(Vec top, Vec f) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(f), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(top), bits));
  }
  static void store_unit(uint32_t *to, const Vec *part, Acc &sum) {
    const __m256i low = _mm256_set1_epi32(0xff);
    __m256i unit = _mm256_setzero_si256();
    for (int p = 3; p >= 0; p--) {
      const __m256i n = _mm256_cvtps_epi32(part[p]);
      sum = _mm256_add_epi32(sum, n);
      unit = _mm256_or_si256(_mm256_slli_epi32(unit, 8), _mm256_and_si256(n, low));
    }
    _mm256_storeu_si256((__m256i *)to, unit);
  }
  static void store_sums(int32_t *to, Acc sum) { _mm256_storeu_si256((__m256i *)to, sum); }

  static void pack_down(const char *from, int n, char *to) {
    for (int i = 0; i < C * L; i++) to[i] = (char)((i < n ? from[i] : 0) ^ kOffset);
  }
  static void interleave(const char *const *rows, char *to) {
    const auto row = [&](int p) { return _mm_loadu_si128((const __m128i *)rows[p]); };
    const __m128i a = _mm_unpacklo_epi8(row(0), row(1)), b = _mm_unpackhi_epi8(row(0), row(1));
    const __m128i c = _mm_unpacklo_epi8(row(2), row(3)), d = _mm_unpackhi_epi8(row(2), row(3));
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128((__m128i *)to + 1, _mm_unpackhi_epi16(a, c));
    _mm_storeu_si128((__m128i *)to + 2, _mm_unpacklo_epi16(b, d));
    _mm_storeu_si128((__m128i *)to + 3, _mm_unpackhi_epi16(b, d));
  }
};

}  // namespace
}  // namespace fastfill
