// Packed weights on AVX-512 F/BW/DQ/VL.
#include "avx512.h"
#include "packed.h"
#include "packed_avx2.h"

namespace fastfill {
namespace {

struct Avx512Packed : Avx512, Avx2Bytes {
  static constexpr int kSums = 2, kTokens = 8;
  using Avx2Bytes::load;
  using Avx512::store;

  static Bytes spread(uint32_t bits) { return _mm256_maskz_set1_epi8(bits, 1); }
  static Vec load_floats(const float *p) { return _mm512_loadu_ps(p); }
  static Vec floats(Bytes v, int part) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v)));
  }
  static Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(Vec v) { return _mm512_reduce_add_ps(v); }
  static __m128i sixteen(Vec v) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)); }
  static Bytes rounded_bytes(const Vec *part) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(part[0])), sixteen(part[1]), 1);
  }
  static Vec steps(int first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_set1_epi32(first), lanes));
  }
  static __m512i low(__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); }
  static __m512i high(__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); }
  static void transpose(const int8_t *from, size_t stride, int8_t *to, size_t to_stride) {
    __m512i a[16];
    for (int i = 0; i < 16; i++) {
      const auto row = [&](int lane) { return _mm_loadu_si128((const __m128i *)(from + (lane * 16 + i) * stride)); };
      a[i] = _mm512_inserti64x2(_mm512_castsi128_si512(row(0)), row(1), 1);
      a[i] = _mm512_inserti64x2(_mm512_inserti64x2(a[i], row(2), 2), row(3), 3);
    }
    turn<Avx512Packed>(a);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_stride, a[i]);
  }
  static Bytes table(const Vec *part) { return _mm256_broadcastsi128_si256(sixteen(part[0])); }
};

}  // namespace
const PackedLoops avx512_packed[kPackedKinds] = FASTFILL_PACKED(Avx512Packed);
}  // namespace fastfill
