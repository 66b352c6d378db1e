// Plain C++ for every other processor.
#include "kernel.h"
#include "low_rank.h"
#include "portable.h"
#include "top_k.h"

namespace fastfill {
namespace {

template <class Store>
struct PortableF32 : Portable, Store {
  using Unit = Four;
  using Acc = Vec;
  static constexpr int V = 2, NN = 2, N1 = 2, P = 1, R = 4, C = 2;
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
  static Vec dot(Vec acc, Unit a, Vec b) {
    for (int i = 0; i < 4; i++) acc.f[i] += a.f[i] * b.f[i];
    return acc;
  }
  static void load_down(const char *a, const char *, Unit *d) { memcpy(d, a, sizeof(Unit) * C); }
  static void pack_down(const char *from, int n, char *to) { Store::pack_down(from, n, to, C * L); }
  static void store_h(uint32_t *to, Vec a, Vec) { memcpy(to, &a, sizeof a); }
};

}  // namespace
const Scheme portable_f32{Ffn<PortableF32<F32>>::loops(), LowRank<PortableF32<F32>>::loops()};
const Scheme portable_bf16_via_f32{Ffn<PortableF32<Bf16ViaF32>>::loops(), LowRank<PortableF32<Bf16ViaF32>>::loops()};
void portable_top_k(const TopKJob &j, int row, char *scratch) { top_k(j, row, scratch); }
}  // namespace fastfill
