// Eight bits: what every int8 scheme shares. Weights are int8 in memory; all other tensors are fp32 or bf16 (Store).
//
// A scale is the largest magnitude over 127, and a number is rounded to nearest, ties to even. Integers are summed exactly;
// what is multiplied in fp32 is not contracted (-ffp-contract=off), so that the reference in torch gives the same bits.
#pragma once
#include <cstring>

#include "scalar.h"

namespace fastfill {
namespace {

struct Quantiser {
  float scale, inverse;
};

// From the largest magnitude, as bits. Zeros and what is below 2^-100 become zeros; NaN and infinity make all of it NaN.
inline Quantiser quantiser(uint32_t top_bits) {
  float top;
  memcpy(&top, &top_bits, 4);
  if (top_bits >= 0x7f800000u) return {NAN, 0.0f};
  if (top < 0x1p-100f) return {0.0f, 0.0f};
  return {top / 127.0f, 127.0f / top};
}

// Low byte: f rounded, |f| <= 127; of NaN anything.
inline uint32_t rounded(float f) {
  f += 12582912.0f;  // 1.5 * 2^23: the unit of the sum's last place is 1
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

template <class Store>
struct Int8 : Store {
  static constexpr int kInBytes = 1, kDownBytes = 1;
  static constexpr bool kInPlace = true, kInt8 = true;

  static void pack_row(const char *from, int n, char *to) {
    memcpy(to, from, n);
    memset(to + n, 0, (4 - n % 4) % 4);
  }

  static constexpr int kPart = 64;

  static Quantiser row_quantiser(const char *from, int n) {
    float part[kPart];
    uint32_t top = 0;
    for (int i = 0; i < n; i += kPart) {
      const int m = n - i < kPart ? n - i : kPart;
      Store::unpack(from + (size_t)i * Store::kTensorBytes, m, part);
      for (int k = 0; k < m; k++) {
        uint32_t bits;
        memcpy(&bits, part + k, 4);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
      }
    }
    return quantiser(top);
  }

  // Bytes of columns [i, i + m) plus `offset`; behind the m-th those of zeros.
  static void round_part(const char *from, int i, int m, float inverse, int offset, uint8_t *bytes) {
    float part[kPart];
    Store::unpack(from + (size_t)i * Store::kTensorBytes, m, part);
    for (int k = m; k < kPart; k++) part[k] = 0;
    for (int k = 0; k < kPart; k++) bytes[k] = (uint8_t)(rounded(part[k] * inverse) + offset);
  }

  // Units of four columns, each byte plus `offset`; gives the token's scale.
  static float pack_token(const char *from, int n, uint32_t *to, int stride, int offset) {
    const Quantiser q = row_quantiser(from, n);
    for (int i = 0; i < n; i += kPart) {
      const int m = n - i < kPart ? n - i : kPart;
      uint8_t bytes[kPart];
      round_part(from, i, m, q.inverse, offset, bytes);
      for (int k = 0; k < m; k += 4, to += stride) memcpy(to, bytes + k, 4);
    }
    return q.scale;
  }

  static float round_row(const char *from, int n, char *to) {
    const Quantiser q = row_quantiser(from, n);
    for (int i = 0; i < n; i += kPart) {
      const int m = n - i < kPart ? n - i : kPart;
      uint8_t bytes[kPart];
      round_part(from, i, m, q.inverse, 0, bytes);
      memcpy(to + i, bytes, m);
    }
    return q.scale;
  }

  static int32_t row_sum(const char *row, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += (int8_t)row[i];
    return sum;
  }
};

}  // namespace
}  // namespace fastfill
