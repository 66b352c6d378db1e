// AVX-512 F/BW/DQ/VL: fp32, and bf16 widened to fp32.
#include "avx512.h"
#include "kernel.h"
#include "low_rank.h"
#include "top_k.h"

namespace fastfill {
const Scheme avx512_f32{Ffn<Avx512F32<F32>>::loops(), LowRank<Avx512F32<F32>>::loops()};
const Scheme avx512_bf16_via_f32{Ffn<Avx512F32<Bf16ViaF32>>::loops(), LowRank<Avx512F32<Bf16ViaF32>>::loops()};
void avx512_top_k(const TopKJob &j, int row, char *scratch) { top_k(j, row, scratch); }
}  // namespace fastfill
