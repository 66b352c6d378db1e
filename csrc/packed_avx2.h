// 32 bytes in a register: what packed weights take of AVX2, on AVX-512 too.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fastfill {
namespace {

// Transposes 16 x 16 bytes in each lane of 128 bits: rows i and i + 8 are interleaved, four times.
template <class S, class Register>
inline void turn(Register *a) {
  Register b[16];
  for (int n = 0; n < 2; n++) {
    for (int i = 0; i < 8; i++) b[2 * i] = S::low(a[i], a[i + 8]), b[2 * i + 1] = S::high(a[i], a[i + 8]);
    for (int i = 0; i < 8; i++) a[2 * i] = S::low(b[i], b[i + 8]), a[2 * i + 1] = S::high(b[i], b[i + 8]);
  }
}

struct Avx2Bytes {
  using Bytes = __m256i;
  static constexpr bool kTables = true;

  static Bytes load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
  static void store_bytes(int8_t *to, Bytes v) { _mm256_storeu_si256((__m256i *)to, v); }
  static Bytes bits(Bytes v, int from, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(v, from), _mm256_set1_epi8((char)mask));
  }
  static Bytes with_high(Bytes low, Bytes high) { return _mm256_or_si256(low, _mm256_slli_epi16(high, 4)); }
  static Bytes nibbles(const uint8_t *p) {
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
  }
  static Bytes spread(uint32_t bits) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(1));
  }
  static Bytes minus(Bytes v, int n) { return _mm256_sub_epi8(v, _mm256_set1_epi8((char)n)); }
  static Bytes look_up(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }

  static void scales(uint64_t eight, float d, float *to) {
    const __m256 f = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)eight)));
    _mm256_storeu_ps(to, _mm256_mul_ps(f, _mm256_set1_ps(d)));
  }

  static __m256i low(__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); }
  static __m256i high(__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); }
  static void transpose(const int8_t *from, size_t stride, int8_t *to, size_t to_stride) {
    for (int half = 0; half < 2; half++, from += 32 * stride, to += 32) {
      __m256i a[16];
      for (int i = 0; i < 16; i++) {
        const __m128i *p = (const __m128i *)(from + i * stride), *q = (const __m128i *)(from + (16 + i) * stride);
        a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(p)), _mm_loadu_si128(q), 1);
      }
      turn<Avx2Bytes>(a);
      for (int i = 0; i < 16; i++) _mm256_storeu_si256((__m256i *)(to + i * to_stride), a[i]);
    }
  }
};

}  // namespace
}  // namespace fastfill
