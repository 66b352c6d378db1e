// Plain C++ for every other processor: vectors of 4 floats as arrays, which compilers turn into SSE2, NEON and so on.
#include "kernel.h"
#include "low_rank.h"
#include "scalar.h"
#include "top_k.h"

namespace fastfill {
namespace {

struct Four {
  float f[4];
};

template <class Store>
struct Portable : Store {
  using Vec = Four;
  using Unit = Four;
  static constexpr int L = 4, V = 2, NN = 2, N1 = 2, P = 1, R = 4, C = 2;
  static Vec zero() { return Vec{{0, 0, 0, 0}}; }
  static Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }
  static Unit load_unit(const uint32_t *p) {
    Unit v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static Vec broadcast(const void *p) {
    float f;
    memcpy(&f, p, 4);
    return Vec{{f, f, f, f}};
  }
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
  static Vec dot(Vec acc, Unit a, Vec b) {
    for (int i = 0; i < 4; i++) acc.f[i] += a.f[i] * b.f[i];
    return acc;
  }
  static Vec act(Vec g, int kind) {
    for (int i = 0; i < 4; i++) g.f[i] = act_scalar(g.f[i], kind);
    return g;
  }
  static void load_down(const char *a, const char *, Unit *d) { memcpy(d, a, sizeof(Unit) * C); }
  static void pack_down(const char *from, int n, char *to) { Store::pack_down(from, n, to, C * L); }
  static void store_h(uint32_t *to, Vec a, Vec) { memcpy(to, &a, sizeof a); }
};

}  // namespace
const Scheme portable_f32{Ffn<Portable<F32>>::loops(), LowRank<Portable<F32>>::loops()};
const Scheme portable_bf16_via_f32{Ffn<Portable<Bf16ViaF32>>::loops(), LowRank<Portable<Bf16ViaF32>>::loops()};
void portable_top_k(const TopKJob &j, int row, char *scratch) { top_k(j, row, scratch); }
}  // namespace fastfill
