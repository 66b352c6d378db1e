// Packed weights on AVX2.
#include "packed_avx2.h"

#include "avx2.h"
#include "packed.h"

namespace fastfill {
namespace {

struct Avx2Packed : Avx2, Avx2Bytes {
  static constexpr int kSums = 4, kTokens = 2;
  using Avx2::store;
  using Avx2Bytes::load;

  static Vec load_floats(const float *p) { return _mm256_loadu_ps(p); }
  static Vec floats(Bytes v, int part) {
    const __m128i half = part & 2 ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part & 1 ? _mm_srli_si128(half, 8) : half));
  }
  static Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(Vec v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static __m256i words(const Vec *two) { return _mm256_packs_epi32(_mm256_cvtps_epi32(two[0]), _mm256_cvtps_epi32(two[1])); }
  static Bytes rounded_bytes(const Vec *part) {  // packing works within 128 bits
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words(part), words(part + 2)), order);
  }
  static Vec steps(int first) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
  static Bytes table(const Vec *part) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5), w = words(part);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(w, w), order);
  }
};

}  // namespace
const PackedLoops avx2_packed[kPackedKinds] = FASTFILL_PACKED(Avx2Packed);
}  // namespace fastfill
