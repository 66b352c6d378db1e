// Which scores of a row are the largest: plain loops, compiled and vectorised once per instruction set.
//
// The K-th largest value is found by bisection on the bits: at most 32 counts of how many keys are at least a limit,
// each a walk over the row in L1. No histogram to clear, and no time that depends on the order of the data. Then one
// pass without branches writes the ids in rising order.
#pragma once
#include <cstring>

#include "job.h"

namespace fastfill {
namespace {

// A number that orders as the float does: negative ones reversed, -0 equal to 0, NaN equal to infinity.
inline uint32_t sort_key(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits = f == 0.0f ? 0u : f != f ? 0x7f800000u : bits;
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

inline int count_from(const uint32_t *keys, int n, uint32_t limit) {
  int count = 0;
  for (int i = 0; i < n; i++) count += keys[i] >= limit;
  return count;
}

// Writes the positions in [from, to) of keys that are at least `limit`, rising, until `kept` are written.
inline int write_from(const uint32_t *keys, int from, int to, uint32_t limit, int32_t *ids, int k, int kept) {
  for (int i = from; i < to && k < kept; i++) {
    ids[k] = i;  // overwritten unless taken
    k += keys[i] >= limit;
  }
  return k;
}

inline void top_k(const TopKJob &j, int row, char *scratch) {
  const float *from = j.scores + row * j.stride;
  const int n = j.neurons, kept = j.kept;
  int32_t *ids = j.ids + (int64_t)row * kept;
  if (kept == 0) return;
  uint32_t *keys = (uint32_t *)scratch;
  uint32_t limit = 0xffffffffu, high = 0;
  for (int i = 0; i < n; i++) {
    const uint32_t key = sort_key(from[i]);
    keys[i] = key;
    limit = key < limit ? key : limit;
    high = key > high ? key : high;
  }
  // The largest limit that at least `kept` keys reach, or one that exactly so many reach.
  int reach = n;
  while (limit < high && reach != kept) {
    const uint32_t middle = limit + (high - limit) / 2 + 1;
    const int count = count_from(keys, n, middle);
    if (count >= kept)
      limit = middle, reach = count;
    else
      high = middle - 1;
  }
  // If more keys reach it, those that equal it are ties: all up to some position are kept, and none after it.
  int cut = n;
  for (int spare = reach - kept; spare > 0; spare -= keys[cut] == limit) cut--;
  const int k = write_from(keys, 0, cut, limit, ids, 0, kept);
  write_from(keys, cut, n, limit + 1, ids, k, kept);
}

}  // namespace
}  // namespace fastfill
