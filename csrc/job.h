// What the driver (fastfill.cpp) hands to the loops (kernel.h): plain data only, because the loops are compiled once
// per instruction set and must not share inline functions with code that runs on every processor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastfill {

struct Block {           // tokens that share one selection; long blocks are cut into several of these
  int64_t row0;          // first token
  int32_t tokens, padded;  // padded: rounded up to whole vectors
  const int32_t *ids;    // its k neurons, rising
  int32_t k;
  size_t x_at, h_at;     // where its packed x and its activations start, in 4-byte units
};

struct Job {
  const char *x, *gate, *up, *down_t, *init;
  char *out;
  int64_t x_stride, gate_stride, up_stride, down_stride, init_stride, out_stride;  // bytes
  int32_t hidden, neurons, activation, threads;
  int32_t n_blocks;
  const Block *blocks;
  uint32_t *xp;  // packed x of all blocks
  uint32_t *h;   // activations of all blocks
  // gate/up: chunks of `chunk` neurons; down: `f_chunk` neurons by `c_tiles` column tiles; blocks in `n_groups` groups
  int32_t chunk, n_chunks, f_chunk, n_f_chunks, c_tiles, n_c_chunks, n_groups, group_tokens;
};

struct Sizes {            // per scheme and shape, so that the driver can cut the work and allocate
  int32_t lanes;          // tokens per vector
  int32_t per_unit;       // elements of H (or neurons, in h) per 4-byte unit: 2 for bf16 dot products, else 1
  int32_t tile_columns;   // columns of one tile of the second half
  int32_t element;        // bytes of one element in the packed chunks
};

struct Loops {
  Sizes sizes;
  size_t (*gate_up_bytes)(const Job &);  // scratch of one thread
  size_t (*down_bytes)(const Job &);
  void (*pack_x)(const Job &, int block);
  void (*gate_up)(const Job &, int task, char *scratch);
  void (*down)(const Job &, int task, char *scratch);
};

struct Isa {
  const char *name;
  bool (*supported)();
  const Loops *f32, *bf16;
};

// One per translation unit; null where the compiler could not build it.
extern const Loops avx512_bf16_bf16, avx512_f32, avx512_bf16_via_f32, avx2_f32, avx2_bf16_via_f32, portable_f32,
    portable_bf16_via_f32;

}  // namespace fastfill
