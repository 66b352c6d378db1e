// Eight bits on AVX2: vpmaddubsw multiplies unsigned with signed bytes and adds pairs in 16 bits, where it saturates. So the
// weight gives its magnitude (at most 128) and its sign goes to the other factor (at most 127): a pair is at most 32,512.
#include "int8_avx2.h"
#include "kernel.h"
#include "product.h"

namespace fastfill {
namespace {

template <class Store>
struct Avx2Maddubs : Avx2Int8<Store, 0> {
  using Acc = __m256i;
  static Acc dot(Acc acc, __m256i x, __m256i w) { return dot_down(acc, w, x); }
  static Acc dot_down(Acc acc, __m256i weight, __m256i other) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(other, weight));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace
const Loops avx2_int8_f32 = Ffn<Avx2Maddubs<F32>>::loops(), avx2_int8_bf16 = Ffn<Avx2Maddubs<Bf16ViaF32>>::loops();
const ProductLoops avx2_product = Product<Avx2Maddubs<F32>>::loops();
}  // namespace fastfill
