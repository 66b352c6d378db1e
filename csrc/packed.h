// Rows of weights as GGUF files hold them, in blocks of 4 to 8 bits: unpacked, rounded to int8, multiplied.
//
// A weight is scale * code - minimum, with one scale and one minimum for each group of 16 or 32 columns. The product is exact
// in fp32 (11 + 7 bits of the scale, at most 8 of the code, never subnormal), so there is one rounding, fused or not. What
// differs between formats is where codes and scales lie: `head` gives a block's scales and minima, `codes` the codes of 32
// columns plus kOffset. What differs between instruction sets (S) is in packed_*.
#pragma once
#include "int8.h"
#include "job.h"

namespace fastfill {
namespace {

inline float half_to_float(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  const uint32_t bits = (uint32_t)(h & 0x8000) << 16 | ((exponent == 31 ? 255 : exponent + 112) << 23) | mantissa << 13;
  float f;
  memcpy(&f, &bits, 4);
  const float tiny = (float)mantissa * 0x1p-24f;
  return exponent ? f : h & 0x8000 ? -tiny : tiny;
}

// The formats, named as in GGUF; the numbers are its types.

// Blocks of 256: eight groups whose scales and minima are of six bits; then the fifth bits, if any, and the low four.
template <class S, bool kFive>
struct GroupsOf32 {
  using Bytes = typename S::Bytes;
  static constexpr int kKind = kFive ? 13 : 12, kColumns = 256, kBytes = kFive ? 176 : 144, kGroup = 32, kOffset = 0;
  static constexpr bool kFourBits = !kFive, kMinima = true;

  static void head(const uint8_t *b, float *scale, float *minimum) {
    uint32_t s, m, both;
    memcpy(&s, b + 4, 4), memcpy(&m, b + 8, 4), memcpy(&both, b + 12, 4);
    const uint32_t low = 0x0f0f0f0fu, high = 0x30303030u;
    S::scales((s & (low | high)) | (uint64_t)((both & low) | (s >> 2 & high)) << 32, half_to_float(b), scale);
    S::scales((m & (low | high)) | (uint64_t)((both >> 4 & low) | (m >> 2 & high)) << 32, half_to_float(b + 2), minimum);
  }
  static Bytes codes(const uint8_t *b, int sub) {
    const Bytes four = S::bits(S::load(b + kBytes - 128 + sub / 2 * 32), sub % 2 * 4, 15);
    return kFive ? S::with_high(four, S::bits(S::load(b + 16), sub, 1)) : four;
  }
};
template <class S>
using Q4K = GroupsOf32<S, false>;
template <class S>
using Q5K = GroupsOf32<S, true>;

template <class S>
struct Q6K {
  using Bytes = typename S::Bytes;
  static constexpr int kKind = 14, kColumns = 256, kBytes = 210, kGroup = 16, kOffset = 32;
  static constexpr bool kFourBits = false, kMinima = false;

  static void head(const uint8_t *b, float *scale, float *) {
    uint64_t s[2];
    memcpy(s, b + 192, 16);
    const float d = half_to_float(b + 208);
    S::scales(s[0], d, scale), S::scales(s[1], d, scale + 8);
  }
  static Bytes codes(const uint8_t *b, int sub) {
    const int half = sub / 4, quarter = sub % 4;
    const Bytes four = S::bits(S::load(b + half * 64 + quarter % 2 * 32), quarter / 2 * 4, 15);
    return S::with_high(four, S::bits(S::load(b + 128 + half * 32), quarter * 2, 3));
  }
};

template <class S>
struct Q80 {
  static constexpr int kKind = 8, kColumns = 32, kBytes = 34, kGroup = 32, kOffset = 0;
  static constexpr bool kFourBits = false, kMinima = false;
  static void head(const uint8_t *b, float *scale, float *) { *scale = half_to_float(b); }
  static typename S::Bytes codes(const uint8_t *b, int) { return S::load(b + 2); }
};

// Blocks of 32: scale, minimum (if any; here added), fifth bits (if any), the low four.
template <class S, bool kFive, bool kAdded>
struct OneGroup {
  static constexpr int kKind = (kFive ? 6 : 2) + kAdded, kColumns = 32, kBytes = 18 + 2 * kAdded + 4 * kFive, kGroup = 32;
  static constexpr int kOffset = kAdded ? 0 : kFive ? 16 : 8;
  static constexpr bool kFourBits = !kFive, kMinima = kAdded;

  static void head(const uint8_t *b, float *scale, float *minimum) {
    *scale = half_to_float(b);
    if (kAdded) *minimum = -half_to_float(b + 2);
  }
  static typename S::Bytes codes(const uint8_t *b, int) {
    const typename S::Bytes four = S::nibbles(b + kBytes - 16);
    uint32_t fifth = 0;
    if (kFive) memcpy(&fifth, b + kBytes - 20, 4);
    return kFive ? S::with_high(four, S::spread(fifth)) : four;
  }
};
template <class S>
using Q40 = OneGroup<S, false, false>;
template <class S>
using Q41 = OneGroup<S, false, true>;
template <class S>
using Q50 = OneGroup<S, true, false>;
template <class S>
using Q51 = OneGroup<S, true, true>;

template <class S, template <class> class Of>
struct Packed {
  using Format = Of<S>;
  using Vec = typename S::Vec;
  using Bytes = typename S::Bytes;
  static constexpr int L = S::L, V = 32 / L, kSubs = Format::kColumns / 32, kGroups = Format::kColumns / Format::kGroup;

  struct Head {
    float scale[kGroups], minimum[kGroups];
    explicit Head(const uint8_t *b) { Format::head(b, scale, minimum); }
  };

  // The v-th vector of a sub-block's weights.
  static Vec weights(const Head &head, Bytes codes, int sub, int v) {
    const int group = Format::kGroup == 32 ? sub : 2 * sub + v * L / 16;
    const Vec code = S::floats(codes, v), scale = S::all(head.scale[group]);
    return Format::kMinima ? S::multiply_subtract(scale, code, S::all(head.minimum[group])) : S::mul(scale, code);
  }
  static Bytes signed_codes(const uint8_t *b, int sub) {
    const Bytes codes = Format::codes(b, sub);
    return Format::kOffset ? S::minus(codes, Format::kOffset) : codes;
  }

  static void unpack_block(const uint8_t *b, float *to) {
    const Head head(b);
    for (int sub = 0; sub < kSubs; sub++) {
      const Bytes codes = signed_codes(b, sub);
      for (int v = 0; v < V; v++) S::store(to + sub * 32 + v * L, weights(head, codes, sub, v));
    }
  }

  static void unpack(const uint8_t *row, int blocks, float *to) {
    for (int i = 0; i < blocks; i++) unpack_block(row + (size_t)i * Format::kBytes, to + (size_t)i * Format::kColumns);
  }

  static void unpack_bf16(const uint8_t *row, int blocks, char *to) {
    for (int i = 0; i < blocks; i++) {
      float part[Format::kColumns];
      unpack_block(row + (size_t)i * Format::kBytes, part);
      Bf16ViaF32::pack_out(part, Format::kColumns, to + (size_t)i * Format::kColumns * 2);
    }
  }

  static void scales(const uint8_t *row, int blocks, float *scale, float *inverse) {
    uint32_t top = 0;
    for (int i = 0; i < blocks; i++) {
      float part[Format::kColumns];
      unpack_block(row + (size_t)i * Format::kBytes, part);
      for (int k = 0; k < Format::kColumns; k++) {
        uint32_t bits;
        memcpy(&bits, part + k, 4);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
      }
    }
    const Quantiser q = quantiser(top);
    *scale = q.scale, *inverse = q.inverse;
  }

  // inverse is not 0: then no weight is NaN.
  static void round(const uint8_t *row, int blocks, float inverse, int8_t *to) {
    const Vec by = S::all(inverse);
    for (int i = 0; i < blocks; i++) {
      const uint8_t *b = row + (size_t)i * Format::kBytes;
      const Head head(b);
      for (int sub = 0; sub < kSubs; sub++, to += 32) {
        if (S::kTables && Format::kFourBits) {  // 16 weights are all there are
          Vec part[16 / L];
          for (int v = 0; v < 16 / L; v++) {
            const Vec code = S::steps(v * L - Format::kOffset), scale = S::all(head.scale[sub]);
            part[v] = Format::kMinima ? S::multiply_subtract(scale, code, S::all(head.minimum[sub])) : S::mul(scale, code);
            part[v] = S::mul(part[v], by);
          }
          S::store_bytes(to, S::look_up(S::table(part), Format::codes(b, sub)));
        } else {
          const Bytes codes = signed_codes(b, sub);
          Vec part[V];
          for (int v = 0; v < V; v++) part[v] = S::mul(weights(head, codes, sub, v), by);
          S::store_bytes(to, S::rounded_bytes(part));
        }
      }
    }
  }

  // Adds to the sums of T tokens, in an order that does not depend on T.
  template <int T>
  static void dot(const uint8_t *row, int blocks, const float *x, size_t stride, float *sums) {
    constexpr int K = S::kSums;
    Vec sum[T][K];
    for (int t = 0; t < T; t++)
      for (int k = 0; k < K; k++) sum[t][k] = S::zero();
    for (int i = 0; i < blocks; i++) {
      const uint8_t *b = row + (size_t)i * Format::kBytes;
      const Head head(b);
      for (int sub = 0; sub < kSubs; sub++, x += 32) {
        const Bytes codes = signed_codes(b, sub);
        for (int v = 0; v < V; v++) {
          const Vec w = weights(head, codes, sub, v);
          for (int t = 0; t < T; t++) {
            Vec &s = sum[t][v % K];
            s = S::multiply_add(w, S::load_floats(x + t * stride + v * L), s);
          }
        }
      }
    }
    for (int t = 0; t < T; t++) {
      Vec all = sum[t][0];
      for (int k = 1; k < K; k++) all = S::add(all, sum[t][k]);
      sums[t] += S::total(all);
    }
  }

  template <int T>
  static void dots_of(const uint8_t *row, int blocks, const float *x, int tokens, float *sums) {
    const size_t stride = (size_t)blocks * Format::kColumns;
    for (; tokens >= T; tokens -= T, x += T * stride, sums += T) dot<T>(row, blocks, x, stride, sums);
    if constexpr (T > 1) dots_of<T / 2>(row, blocks, x, tokens, sums);
  }
  static void dots(const uint8_t *row, int blocks, const float *x, int tokens, float *sums) {
    dots_of<S::kTokens>(row, blocks, x, tokens, sums);
  }

  static constexpr PackedLoops loops() {
    return {Format::kKind, Format::kColumns, Format::kBytes, unpack, unpack_bf16, scales, round, S::transpose, dots};
  }
};

}  // namespace
}  // namespace fastfill

// All formats on S.
#define FASTFILL_PACKED(S)                                                                                              \
  {                                                                                                                     \
    Packed<S, Q4K>::loops(), Packed<S, Q5K>::loops(), Packed<S, Q6K>::loops(), Packed<S, Q80>::loops(),                 \
        Packed<S, Q40>::loops(), Packed<S, Q41>::loops(), Packed<S, Q50>::loops(), Packed<S, Q51>::loops(),             \
  }
