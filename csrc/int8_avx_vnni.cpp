// Eight bits on AVX-VNNI, vpdpbusd in 256 bits: laptops since 2021.
#include "int8_avx2.h"
#include "kernel.h"
#include "product.h"

namespace fastfill {
namespace {

template <class Store>
struct AvxVnni : Avx2Int8<Store, 128> {
  using Acc = __m256i;
  static Acc dot(Acc acc, __m256i x, __m256i w) {  // as in int8_avx512_vnni.cpp, not the intrinsic
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
    return acc;
  }
  static Acc dot_down(Acc acc, __m256i down, __m256i h) { return dot(acc, down, h); }
};

}  // namespace
const Loops avx_vnni_int8_f32 = Ffn<AvxVnni<F32>>::loops(), avx_vnni_int8_bf16 = Ffn<AvxVnni<Bf16ViaF32>>::loops();
const ProductLoops avx_vnni_product = Product<AvxVnni<F32>>::loops();
}  // namespace fastfill
