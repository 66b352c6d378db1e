// AVX-512 with BF16.
#include "avx512_bf16.h"
#include "kernel.h"
#include "low_rank.h"

namespace fastfill {
const Scheme avx512_bf16_bf16{Ffn<Avx512Bf16>::loops(), LowRank<Avx512Bf16>::loops()};
}  // namespace fastfill
