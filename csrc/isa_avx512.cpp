// AVX-512 F/BW/DQ/VL: fp32, and bf16 widened to fp32.
#include "avx512.h"
#include "kernel.h"

namespace fastfill {
const Loops avx512_f32 = Ffn<Avx512F32<F32>>::loops();
const Loops avx512_bf16_via_f32 = Ffn<Avx512F32<Bf16ViaF32>>::loops();
}  // namespace fastfill
