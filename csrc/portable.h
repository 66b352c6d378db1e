// 4 floats as an array, which compilers turn into SSE2, NEON and so on: what the portable schemes share.
#pragma once
#include "scalar.h"

namespace fastfill {
namespace {

struct Four {
  float f[4];
};

struct Portable {
  using Vec = Four;
  static constexpr int L = 4;
  static Vec zero() { return Vec{{0, 0, 0, 0}}; }
  static Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }
  static Vec mul(Vec a, Vec b) {
    for (int i = 0; i < 4; i++) a.f[i] *= b.f[i];
    return a;
  }
  static Vec add(Vec a, Vec b) {
    for (int i = 0; i < 4; i++) a.f[i] += b.f[i];
    return a;
  }
  static Vec sub(Vec a, Vec b) {
    for (int i = 0; i < 4; i++) a.f[i] -= b.f[i];
    return a;
  }
  static Vec max(Vec a, Vec b) {
    for (int i = 0; i < 4; i++) a.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i];
    return a;
  }
  static Vec all(float f) { return Vec{{f, f, f, f}}; }
  static Vec exp(Vec z) {
    for (int i = 0; i < 4; i++) z.f[i] = expf(z.f[i]);
    return z;
  }
  static Vec act(Vec g, int kind) {
    for (int i = 0; i < 4; i++) g.f[i] = act_scalar(g.f[i], kind);
    return g;
  }
};

}  // namespace
}  // namespace fastfill
