// Conversions and copies that every scheme shares.
#pragma once
#include <math.h>

#include <cstring>

#include "fastfill.h"
#include "job.h"

namespace fastfill {
namespace {

inline float bf16_to_float(const char *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
inline void float_to_bf16(float f, char *p) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t h = f != f ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  memcpy(p, &h, 2);
}

inline float act_scalar(float g, int act) {
  switch (act) {
    case FASTFILL_SILU: return g / (1.0f + expf(-g));
    case FASTFILL_GELU: return 0.5f * g * erfcf(-g * 0.70710678118654752f);
    case FASTFILL_GELU_TANH: return g / (1.0f + expf(-1.5957691216057308f * (g + 0.044715f * g * g * g)));
    default: return g > 0.0f || g != g ? g : 0.0f;
  }
}

// How the second half is cut: for 48 KB of L1 and up, and vectors of 16 tokens.
struct Cuts {
  static constexpr int kStrip = kMaxBlock;  // tokens of h that lie together
  static constexpr int kChunk = 512 * 1024;  // bytes of a chunk of neurons in the first half: its share of L2
  static constexpr int kPanel = 32 * 1024;  // bytes of a chunk of neurons in one tile of columns
  static constexpr int kMostTiles = 8;  // of columns in a task: of its y, [tile][token][column], L2 should hold much
  static constexpr bool kTiles = false;  // whether AMX multiplies; then Use configures its tiles for a scope
  struct Use {};
  static constexpr int kRowUnits = 1;  // units of packed rows are filled up to a multiple of it
  static constexpr float kNarrow = 0.08f;  // what a task of one tile costs more than its share of a wide one
};

// How elements lie in memory and in the packed chunks. Tensors and chunks in fp32:
struct F32 : Cuts {
  static constexpr int kInBytes = 4, kTensorBytes = 4, kDownBytes = 4;
  static constexpr bool kInPlace = true, kInt8 = false;
  static void pack_row(const char *from, int n, char *to) { memcpy(to, from, (size_t)n * 4); }
  static void pack_token(const char *from, int n, uint32_t *to, int stride) {
    for (int i = 0; i < n; i++) memcpy(to + (size_t)i * stride, from + (size_t)i * 4, 4);
  }
  static void pack_down(const char *from, int n, char *to, int tile) {
    if (n >= tile) return (void)memcpy(to, from, (size_t)tile * 4);  // a length that is known: two or three vectors
    memcpy(to, from, (size_t)n * 4);
    memset(to + (size_t)n * 4, 0, (size_t)(tile - n) * 4);
  }
  static void unpack(const char *from, int n, float *to) { memcpy(to, from, (size_t)n * 4); }
  static void pack_out(const float *from, int n, char *to) { memcpy(to, from, (size_t)n * 4); }
};

// Tensors in bf16, chunks widened to fp32 while they are packed:
struct Bf16ViaF32 : Cuts {
  static constexpr int kInBytes = 2, kTensorBytes = 2, kDownBytes = 4;
  static constexpr bool kInPlace = false, kInt8 = false;
  static void unpack(const char *from, int n, float *to) {
    for (int i = 0; i < n; i++) to[i] = bf16_to_float(from + (size_t)i * 2);
  }
  static void pack_row(const char *from, int n, char *to) {
    for (int i = 0; i < n; i++) {
      const float f = bf16_to_float(from + (size_t)i * 2);
      memcpy(to + (size_t)i * 4, &f, 4);
    }
  }
  static void pack_token(const char *from, int n, uint32_t *to, int stride) {
    for (int i = 0; i < n; i++) {
      const float f = bf16_to_float(from + (size_t)i * 2);
      memcpy(to + (size_t)i * stride, &f, 4);
    }
  }
  static void pack_down(const char *from, int n, char *to, int tile) {
    if (n >= tile) return pack_row(from, tile, to);
    pack_row(from, n, to);
    memset(to + (size_t)n * 4, 0, (size_t)(tile - n) * 4);
  }
  static void pack_out(const float *from, int n, char *to) {
    for (int i = 0; i < n; i++) float_to_bf16(from[i], to + (size_t)i * 2);
  }
};

}  // namespace
}  // namespace fastfill
