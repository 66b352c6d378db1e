// 16 floats in a register: what both AVX-512 schemes share.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace fastfill {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int L = 16;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec all(float f) { return _mm512_set1_ps(f); }

  // exp with relative error below 2^-22; the clamps keep NaN (second operand) and still reach 0 and inf.
  static Vec exp(Vec z) {
    z = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-105.0f), z));
    const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(z, _mm512_set1_ps(1.44269504f)), 8);
    Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), z);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    Vec p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
  }

  static Vec act(Vec g, int kind) {
    const Vec one = _mm512_set1_ps(1.0f);
    if (kind == FASTFILL_SILU) return _mm512_div_ps(g, _mm512_add_ps(one, exp(_mm512_sub_ps(zero(), g))));
    if (kind == FASTFILL_RELU) return _mm512_max_ps(zero(), g);
    if (kind == FASTFILL_GELU_TANH) {
      const Vec cubic = _mm512_mul_ps(_mm512_mul_ps(g, g), _mm512_mul_ps(g, _mm512_set1_ps(0.044715f)));
      const Vec z = _mm512_mul_ps(_mm512_set1_ps(-1.5957691216057308f), _mm512_add_ps(g, cubic));
      return _mm512_div_ps(g, _mm512_add_ps(one, exp(z)));
    }
    float lane[16];
    store(lane, g);
    for (float &l : lane) l = act_scalar(l, kind);
    return load(lane);
  }
};

// 24 sums stay in registers: 6 neurons x (gate, up) x 2 vectors of tokens, or 12 tokens x 2 vectors of columns.
template <class Store>
struct Avx512F32 : Avx512, Store {
  using Unit = __m512;
  using Acc = Vec;
  static constexpr int V = 2, NN = 6, N1 = 8, P = 1, R = 12, C = 2;
  static Unit load_unit(const uint32_t *p) { return _mm512_loadu_ps(p); }
  static Vec broadcast(const void *p) {
    float f;
    memcpy(&f, p, 4);
    return _mm512_set1_ps(f);
  }
  static Vec dot(Vec acc, Unit a, Vec b) { return _mm512_fmadd_ps(a, b, acc); }
  static void load_down(const char *a, const char *, Unit *d) {
    d[0] = _mm512_loadu_ps(a);
    d[1] = _mm512_loadu_ps(a + 64);
  }
  static void pack_down(const char *from, int n, char *to) { Store::pack_down(from, n, to, C * L); }
  static void store_h(uint32_t *to, Vec a, Vec) { _mm512_storeu_ps(to, a); }
};

}  // namespace
}  // namespace fastfill
