// Eight bits on AVX-512 VNNI.
#include "int8_avx512.h"
#include "kernel.h"
#include "product.h"

namespace fastfill {
const Loops avx512_vnni_int8_f32 = Ffn<Avx512Int8<F32>>::loops(), avx512_vnni_int8_bf16 = Ffn<Avx512Int8<Bf16ViaF32>>::loops();
const ProductLoops avx512_vnni_product = Product<Avx512Int8<F32>>::loops();
}  // namespace fastfill
