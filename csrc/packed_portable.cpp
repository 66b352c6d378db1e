// Packed weights in plain C++.
#include "packed.h"
#include "portable.h"

namespace fastfill {
namespace {

struct PortablePacked : Portable {
  struct Bytes {
    uint8_t b[32];
  };
  static constexpr bool kTables = false;
  static constexpr int kSums = 2, kTokens = 4;

  static Bytes load(const uint8_t *p) {
    Bytes v;
    memcpy(v.b, p, 32);
    return v;
  }
  static Vec load_floats(const float *p) { return Portable::load(p); }
  static void store_bytes(int8_t *to, Bytes v) { memcpy(to, v.b, 32); }
  static Bytes bits(Bytes v, int from, int mask) {
    for (uint8_t &b : v.b) b = (uint8_t)(b >> from & mask);
    return v;
  }
  static Bytes with_high(Bytes low, Bytes high) {
    for (int i = 0; i < 32; i++) low.b[i] = (uint8_t)(low.b[i] | high.b[i] << 4);
    return low;
  }
  static Bytes nibbles(const uint8_t *p) {
    Bytes v;
    for (int i = 0; i < 16; i++) v.b[i] = p[i] & 15, v.b[i + 16] = p[i] >> 4;
    return v;
  }
  static Bytes spread(uint32_t bits) {
    Bytes v;
    for (int i = 0; i < 32; i++) v.b[i] = bits >> i & 1;
    return v;
  }
  static Bytes minus(Bytes v, int n) {
    for (uint8_t &b : v.b) b = (uint8_t)(b - n);
    return v;
  }
  static void scales(uint64_t eight, float d, float *to) {
    for (int i = 0; i < 8; i++) to[i] = d * (float)(int8_t)(eight >> 8 * i);
  }
  static Vec floats(Bytes v, int part) {
    Vec f;
    for (int i = 0; i < L; i++) f.f[i] = (float)(int8_t)v.b[part * L + i];
    return f;
  }
  static Vec multiply_subtract(Vec a, Vec b, Vec c) { return sub(mul(a, b), c); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }
  static float total(Vec v) { return (v.f[0] + v.f[2]) + (v.f[1] + v.f[3]); }
  static Bytes rounded_bytes(const Vec *part) {
    Bytes v;
    for (int i = 0; i < 32; i++) v.b[i] = (uint8_t)rounded(part[i / L].f[i % L]);
    return v;
  }
  static Vec steps(int) { return zero(); }  // no tables
  static Bytes table(const Vec *) { return {}; }
  static Bytes look_up(Bytes, Bytes codes) { return codes; }

  static void transpose(const int8_t *from, size_t stride, int8_t *to, size_t to_stride) {
    for (int i = 0; i < 64; i++)
      for (int k = 0; k < 16; k++) to[k * to_stride + i] = from[i * stride + k];
  }
};

}  // namespace
const PackedLoops portable_packed[kPackedKinds] = FASTFILL_PACKED(PortablePacked);
}  // namespace fastfill
