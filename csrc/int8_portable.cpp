// Eight bits in plain C++.
#include "int8.h"
#include "kernel.h"
#include "portable.h"
#include "product.h"

namespace fastfill {
namespace {

template <class Store>
struct PortableInt8 : Portable, Int8<Store> {
  struct Unit {
    int8_t byte[4 * L];
  };
  struct Acc {
    int32_t n[L];
  };
  static constexpr int V = 2, NN = 2, N1 = 2, P = 4, R = 4, C = 2;
  static constexpr int kXOffset = 0, kDownOffset = 0;

  static Acc all_of(int32_t n) { return Acc{{n, n, n, n}}; }
  static Vec floats(Acc a) {
    Vec f;
    for (int i = 0; i < L; i++) f.f[i] = (float)a.n[i];
    return f;
  }
  static Unit load_unit(const uint32_t *p) {
    Unit u;
    memcpy(&u, p, sizeof u);
    return u;
  }
  static Unit broadcast(const void *p) {
    Unit u;
    for (int i = 0; i < L; i++) memcpy(u.byte + 4 * i, p, 4);
    return u;
  }
  static Acc dot(Acc acc, Unit a, Unit b) {
    for (int i = 0; i < L; i++)
      for (int k = 0; k < 4; k++) acc.n[i] += a.byte[4 * i + k] * b.byte[4 * i + k];
    return acc;
  }
  static Acc dot_down(Acc acc, Unit down, Unit h) { return dot(acc, down, h); }

  static Vec top_bits(Vec top, Vec f) {
    for (int i = 0; i < L; i++) {
      uint32_t a, b;
      memcpy(&a, top.f + i, 4), memcpy(&b, f.f + i, 4);
      b &= 0x7fffffffu;
      a = a > b ? a : b;
      memcpy(top.f + i, &a, 4);
    }
    return top;
  }
  static void store_unit(uint32_t *to, const Vec *part, Acc &) {
    for (int i = 0; i < L; i++) {
      to[i] = 0;
      for (int p = 0; p < 4; p++) to[i] |= (rounded(part[p].f[i]) & 0xff) << (8 * p);
    }
  }
  static void store_sums(int32_t *to, Acc sum) { memcpy(to, sum.n, sizeof sum.n); }

  static void pack_down(const char *from, int n, char *to) {
    memcpy(to, from, n);
    memset(to + n, 0, C * L - n);
  }
  static void interleave(const char *const *rows, char *to) {
    for (int c = 0; c < C * L; c++)
      for (int p = 0; p < 4; p++) to[4 * c + p] = rows[p][c];
  }
};

}  // namespace
const Loops portable_int8_f32 = Ffn<PortableInt8<F32>>::loops(), portable_int8_bf16 = Ffn<PortableInt8<Bf16ViaF32>>::loops();
const ProductLoops portable_product = Product<PortableInt8<F32>>::loops();
}  // namespace fastfill
