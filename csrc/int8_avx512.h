// Eight bits on AVX-512 VNNI: vpdpbusd multiplies four unsigned with four signed bytes and adds to an int32, 64 products an
// instruction. x gets 128 added to each byte, and so do the rows of down: a sum of that kind of neuron starts elsewhere.
#pragma once
#include "avx512.h"
#include "int8.h"

namespace fastfill {
namespace {

template <class Store>
struct Avx512Int8 : Avx512, Int8<Store> {
  using Unit = __m512i;
  using Acc = __m512i;
  static constexpr int V = 2, NN = 6, N1 = 8, P = 4, R = 6, C = 4;
  static constexpr int kXOffset = 128, kDownOffset = 128;
  static constexpr int kMostTiles = 4;  // of 64 columns

  static Acc all_of(int32_t n) { return _mm512_set1_epi32(n); }
  static Vec floats(Acc a) { return _mm512_cvtepi32_ps(a); }
  static Unit load_unit(const uint32_t *p) { return _mm512_loadu_si512(p); }
  static Unit broadcast(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  // Not the intrinsic: gcc 12 copies its sums from register to register, and keeps some in memory, at a third of the speed.
  static Acc dot(Acc acc, Unit x, Unit w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }
  static Acc dot_down(Acc acc, Unit down, Unit h) { return dot(acc, down, h); }

  static Vec top_bits(Vec top, Vec f) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(f), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(top), bits));
  }
  static void store_unit(uint32_t *to, const Vec *part, Acc &sum) {
    const __m512i low = _mm512_set1_epi32(0xff);
    __m512i unit = _mm512_setzero_si512();
    for (int p = 3; p >= 0; p--) {
      const __m512i n = _mm512_cvtps_epi32(part[p]);
      sum = _mm512_add_epi32(sum, n);
      unit = _mm512_or_si512(_mm512_slli_epi32(unit, 8), _mm512_and_si512(n, low));
    }
    _mm512_storeu_si512(to, unit);
  }
  static void store_sums(int32_t *to, Acc sum) { _mm512_storeu_si512(to, sum); }

  // 64 columns in an order in which interleaving bytes, then words, within 128 bits gives columns 0..15, 16..31, ...
  static void pack_down(const char *from, int n, char *to) {
    const __mmask64 mask = n >= 64 ? ~0ull : (1ull << n) - 1;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i line = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(mask, from));
    _mm512_storeu_si512(to, _mm512_xor_si512(line, _mm512_set1_epi8((char)0x80)));
  }
  static void interleave(const char *const *rows, char *to) {
    const __m512i r0 = _mm512_loadu_si512(rows[0]), r1 = _mm512_loadu_si512(rows[1]);
    const __m512i r2 = _mm512_loadu_si512(rows[2]), r3 = _mm512_loadu_si512(rows[3]);
    const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
    const __m512i c = _mm512_unpacklo_epi8(r2, r3), d = _mm512_unpackhi_epi8(r2, r3);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, c));
    _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(a, c));
    _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(b, d));
    _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(b, d));
  }
};

}  // namespace
}  // namespace fastfill
