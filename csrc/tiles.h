// AMX: a tile has 16 rows of 64 bytes, and a product of two multiplies 16 rows by 16 columns of 32 bf16 (or 64 bytes) in 16
// cycles, eight times what AVX-512 does. In assembler, because the compilers' own intrinsics do not tell that they read and
// write memory.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace fastfill {
namespace {
namespace tiles {

constexpr int kRows = 16;
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
// What is multiplied. dot: tile C += tile A times tile B, where A has rows of 64 bytes and B pairs (or fours) of rows.
struct Bf16 {
  using Sum = float;
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
struct Bytes {  // with signs
  using Sum = int32_t;
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

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

// Selected rows lie anywhere, a tile's at equal distances: 32 rows are copied behind each other, a step of 64 bytes each at a
// time, into a ring of steps, and kDepth steps ahead of their product, so that loads and stores have the time of the products.
// With a ring of 16 steps the copies fall out of L1: 1.2 times the time.
constexpr int kRing = 4, kDepth = 3;
constexpr size_t kSlot = 2 * kBytes;

struct Ring {
  char *at;
  int mask;  // steps less one
  char *slot(int s) const { return at + (s & mask) * kSlot; }
};
inline size_t ring_bytes(int n_steps) { return power_of_two(n_steps < kRing ? kRing : n_steps) * kSlot; }

inline void copy_step(const char *const *rows, uintptr_t at, int64_t bytes, char *to) {
  if (bytes >= 64) {
#pragma GCC unroll 32
    for (int r = 0; r < 2 * kRows; r++) _mm512_store_si512(to + r * 64, _mm512_loadu_si512((const char *)((uintptr_t)rows[r] + at)));
  } else {
    const __mmask64 mask = (1ull << bytes) - 1;
    for (int r = 0; r < 2 * kRows; r++)
      _mm512_store_si512(to + r * 64, _mm512_maskz_loadu_epi8(mask, (const char *)((uintptr_t)rows[r] + at)));
  }
}

// Where the sum of a row and the first token of a vector of NV lies.
template <int NV>
constexpr int sums_at(int row, int v) {
  return (row / kRows * NV + v) * 256 + row % kRows * 16;
}

// Sums of 32 rows of so many bytes, `offset` behind those named, by NV vectors of 16 tokens, whose units of four bytes lie
// [unit][token]. Without kCopy the rows are in the ring already, all their steps. `next` comes meanwhile, some lines a step.
template <class D, int NV, bool kCopy>
void rows_by_tokens(const char *const *rows, uintptr_t offset, int64_t bytes, Ring ring, const uint32_t *x, Ahead &next, int lines,
                    typename D::Sum *sums) {
  const int n_steps = (int)((bytes + 63) / 64);
  const auto copy = [&](int s) { copy_step(rows, offset + (uintptr_t)s * 64, bytes - s * 64, ring.slot(s)); };
  zero<0>(), zero<1>(), zero<2>(), zero<3>();
  if (kCopy)
    for (int s = 0; s < kDepth && s < n_steps; s++) copy(s);
  for (int s = 0; s < n_steps; s++, x += kRows * NV * 16) {
    const char *a = ring.slot(s);
    next.advance(lines);
    load<4>(a), load<6>(x, NV * 64);
    D::template dot<0, 4, 6>();
    if (NV == 2) load<7>(x + 16, NV * 64), D::template dot<1, 4, 7>();
    load<5>(a + kBytes);
    D::template dot<2, 5, 6>();
    if (NV == 2) D::template dot<3, 5, 7>();
    if (kCopy && s + kDepth < n_steps) copy(s + kDepth);
  }
  store<0>(sums), store<2>(sums + sums_at<NV>(kRows, 0));
  if (NV == 2) store<1>(sums + sums_at<NV>(0, 1)), store<3>(sums + sums_at<NV>(kRows, 1));
}

}  // namespace tiles
}  // namespace
}  // namespace fastfill
