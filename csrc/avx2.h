// 8 floats in a register: what the AVX2 schemes share.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace fastfill {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int L = 8;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float *p) { return _mm256_loadu_ps(p); }
  static void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec all(float f) { return _mm256_set1_ps(f); }

  // As in avx512.h; 2^n in two factors, so that overflow gives inf and underflow 0.
  static Vec exp(Vec z) {
    z = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), z));
    const Vec n = _mm256_round_ps(_mm256_mul_ps(z, _mm256_set1_ps(1.44269504f)), 8);
    Vec r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), z);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    Vec p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i k = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(k, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(k, half);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
  }

  static Vec act(Vec g, int kind) {
    const Vec one = _mm256_set1_ps(1.0f);
    if (kind == FASTFILL_SILU) return _mm256_div_ps(g, _mm256_add_ps(one, exp(_mm256_sub_ps(zero(), g))));
    if (kind == FASTFILL_RELU) return _mm256_max_ps(zero(), g);
    if (kind == FASTFILL_GELU_TANH) {
      const Vec cubic = _mm256_mul_ps(_mm256_mul_ps(g, g), _mm256_mul_ps(g, _mm256_set1_ps(0.044715f)));
      const Vec z = _mm256_mul_ps(_mm256_set1_ps(-1.5957691216057308f), _mm256_add_ps(g, cubic));
      return _mm256_div_ps(g, _mm256_add_ps(one, exp(z)));
    }
    float lane[8];
    store(lane, g);
    for (float &l : lane) l = act_scalar(l, kind);
    return load(lane);
  }
};

}  // namespace
}  // namespace fastfill
