// AVX-512 with BF16: vdpbf16ps multiplies pairs of bf16 and adds them to fp32 sums. Rounding is to nearest, denormals
// count as zero.
#pragma once
#include "avx512.h"

namespace fastfill {
namespace {

struct Avx512Bf16 : Avx512, Cuts {
  using Unit = __m512bh;
  using Acc = Vec;
  static constexpr int V = 2, NN = 6, N1 = 8, P = 2, R = 12, C = 2;
  static constexpr int kInBytes = 2, kTensorBytes = 2, kDownBytes = 2;
  static constexpr bool kInPlace = true, kInt8 = false;

  static Unit load_unit(const uint32_t *p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Unit broadcast(const void *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vec dot(Vec acc, Unit a, Unit b) { return _mm512_dpbf16_ps(acc, a, b); }

  static void pack_row(const char *from, int n, char *to) {
    memcpy(to, from, (size_t)n * 2);
    if (n % 2) memset(to + (size_t)n * 2, 0, 2);
  }
  static void pack_token(const char *from, int n, uint32_t *to, int stride) {
    for (int i = 0; i < n / 2; i++) memcpy(to + (size_t)i * stride, from + (size_t)i * 4, 4);
    if (n % 2) {
      to[(size_t)(n / 2) * stride] = 0;
      memcpy(to + (size_t)(n / 2) * stride, from + (size_t)(n - 1) * 2, 2);
    }
  }
  // Tokens of neuron a in the low halves, of neuron b in the high halves.
  static void store_h(uint32_t *to, Vec a, Vec b) {
    const __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    const __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
    _mm512_storeu_si512(to, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
  // Columns are stored so that unpacking two neurons' lines word by word gives columns 0..15 and 16..31 in order.
  static void pack_down(const char *from, int n, char *to) {
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    const __m512i line = _mm512_maskz_loadu_epi16(mask, from);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), line));
  }
  static void load_down(const char *a, const char *b, Unit *d) {
    const __m512i ra = _mm512_loadu_si512(a), rb = _mm512_loadu_si512(b);
    d[0] = (__m512bh)_mm512_unpacklo_epi16(ra, rb);
    d[1] = (__m512bh)_mm512_unpackhi_epi16(ra, rb);
  }
  static void unpack(const char *from, int n, float *to) { Bf16ViaF32::unpack(from, n, to); }
  static void pack_out(const float *from, int n, char *to) {
    for (int i = 0; i < n; i += 16) {
      const __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
      const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i));
      _mm256_mask_storeu_epi16(to + (size_t)i * 2, mask, (__m256i)half);
    }
  }
};

}  // namespace
}  // namespace fastfill
