// AMX's tiles as functions: 16 rows of 64 bytes each. In assembler, because the compilers' own intrinsics do not tell that they
// read and write memory.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fastfill {
namespace {
namespace tiles {

constexpr int kRows = 16, kStep = 32;  // bf16 in a row
constexpr size_t kBytes = kRows * 64;

// All eight tiles whole, from here to the end of the scope.
class Use {
 public:
  Use() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Use() { asm volatile("tilerelease"); }
  Use(const Use &) = delete;
};

template <int T>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
void load(const void *p, int64_t stride = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void store(void *p, int64_t stride = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// tile C += tile A (rows of 32) times tile B (pairs of rows)
template <int C, int A, int B>
void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

inline int power_of_two(int at_least) {
  int n = 1;
  while (n < at_least) n *= 2;
  return n;
}

// 16 vectors of 16 times four bytes, rows against columns.
inline void transpose(__m512i *v) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // v[i + k] has column k of each quarter, of rows i to i + 3
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const __m512i low = _mm512_shuffle_i32x4(v[k], v[k + 4], 0x88), high = _mm512_shuffle_i32x4(v[k + 8], v[k + 12], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(v[k], v[k + 4], 0xdd), high2 = _mm512_shuffle_i32x4(v[k + 8], v[k + 12], 0xdd);
    a[k] = _mm512_shuffle_i32x4(low, high, 0x88);
    a[k + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    a[k + 4] = _mm512_shuffle_i32x4(low2, high2, 0x88);
    a[k + 12] = _mm512_shuffle_i32x4(low2, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = a[i];
}

}  // namespace tiles
}  // namespace
}  // namespace fastfill
