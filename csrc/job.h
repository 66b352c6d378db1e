// What the drivers (sparse_ffn.cpp, predict.cpp, packed.cpp) hand to the loops (kernel.h, low_rank.h, top_k.h, packed.h): plain
// data only, because the loops are compiled once per instruction set and must not share inline functions with code that runs
// on every processor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastfill {

constexpr int kMaxBlock = 512;  // tokens; longer blocks are cut: bounds the packed x that a core holds

constexpr int kAllTiles = 1 << 30;  // no bound on a task's column tiles

struct Block {           // tokens that share one selection; long blocks are cut into several of these
  int64_t row0;          // first token
  int32_t tokens, padded;  // padded: rounded up to whole vectors
  const int32_t *ids;    // its k neurons, rising
  int32_t k;
  size_t x_at, h_at;     // where its packed x and its activations start, in 4-byte units
  size_t t_at, q_at;     // int8: where its tokens' scales start, and its activations in eight bits, in 4-byte units
};

struct Job {
  const char *x, *gate, *up, *down_t, *gate_bias, *up_bias, *init;
  char *out;
  int64_t x_stride, gate_stride, up_stride, down_stride, init_stride, out_stride;  // bytes
  int32_t hidden, neurons, activation, threads;
  int32_t n_blocks;
  const Block *blocks;
  uint32_t *xp;  // packed x of all blocks
  uint32_t *h;   // activations of all blocks
  // int8 alone: scales of gate and up (neurons), of down (hidden); of x by token; h in eight bits, and for each block, chunk
  // of f_chunk neurons and token its scale and where its sums start
  const float *gate_scale, *up_scale, *down_scale;
  float *x_scale, *h_scale;
  uint32_t *hq;
  int32_t *h_start;
  // gate/up: chunks of `chunk` neurons; down: `f_chunk` neurons by `c_tiles` column tiles; blocks in `n_groups` groups
  int32_t chunk, n_chunks, f_chunk, n_f_chunks, c_tiles, n_c_chunks, n_groups, group_tokens;
};

struct Sizes {            // per scheme and shape, so that the driver can cut the work and allocate
  int32_t lanes;          // tokens per vector
  int32_t per_unit;       // elements of H (or neurons, in h) per 4-byte unit: 4 for int8 and 2 for bf16 dot products, else 1
  int32_t step;           // elements of H, and neurons in h, are filled up to multiples of it: whole units, or tiles
  int32_t tile_columns;   // columns of one tile of the second half
  int32_t element;        // bytes of one element in the packed chunks
  int32_t chunk;          // bytes of a chunk of neurons, gate and up, in the first half: its share of L2
  int32_t panel;          // bytes of a chunk of neurons in one tile of columns of the second half
  int32_t most_tiles;     // of columns in a task of the second half
  float narrow;           // what a task of one tile costs more than its share of a wide one
};

struct Loops {
  Sizes sizes;
  size_t (*gate_up_bytes)(const Job &);  // scratch of one thread
  size_t (*down_bytes)(const Job &);
  void (*pack_x)(const Job &, int block);
  void (*gate_up)(const Job &, int task, char *scratch);
  float (*round_row)(const char *from, int n, char *to);  // int8 alone: gives the row's scale
  void (*quantise_h)(const Job &, int task);  // null but for int8; a task for each block and chunk of f_chunk neurons
  void (*down)(const Job &, int task, char *scratch);
};

// Two small matrices one after the other: what the predictor and the compensator are (low_rank.h).
struct LowRankJob {
  const char *x, *w_in, *w_out, *bias;
  char *out;
  int64_t x_stride, w_in_stride, w_out_stride, out_stride;  // bytes
  int64_t tokens;
  int32_t hidden, rank, columns;
  int32_t block_size;   // scores: tokens of a block
  int32_t linear_rank;  // compensate: the first rows of w_in that have no SiLU behind them
  int32_t strip;        // tokens whose outputs lie in L2 together
  char *panels;         // packed w_in, then w_out, then bias in fp32
};

struct LowRankLoops {
  int32_t rows;  // of a tile
  size_t (*panel_bytes)(const LowRankJob &);
  size_t (*scratch_bytes)(const LowRankJob &);  // of one thread
  int (*pack_tasks)(const LowRankJob &);
  void (*pack)(const LowRankJob &, int task, float padding);  // padding: bias of the columns that fill the last panel
  void (*scores)(const LowRankJob &, int block, char *scratch);
  void (*compensate)(const LowRankJob &, int strip, char *scratch);
};

struct TopKJob {
  const float *scores;
  int64_t stride;  // elements
  int32_t neurons, kept;
  int32_t *ids;
};
using TopK = void(const TopKJob &, int row, char *scratch);  // scratch: neurons x 4 bytes

struct PackedLoops {      // of one format of packed weights (packed.h)
  int32_t kind, columns, bytes;  // GGUF's number of the format; of a block
  void (*unpack)(const uint8_t *row, int blocks, float *to);
  void (*unpack_bf16)(const uint8_t *row, int blocks, char *to);
  void (*scales)(const uint8_t *row, int blocks, float *scale, float *inverse);
  void (*round)(const uint8_t *row, int blocks, float inverse, int8_t *to);
  void (*transpose)(const int8_t *from, size_t stride, int8_t *to, size_t to_stride);  // 64 rows of 16
  void (*dots)(const uint8_t *row, int blocks, const float *x, int tokens, float *sums);  // adds to sums
};
constexpr int kPackedKinds = 8;

struct ProductJob {       // of two int8 matrices (product.h)
  const int8_t *a, *b;
  float *out;
  int64_t a_stride, b_stride, out_stride, tokens;
  int32_t rows, columns, chunk;  // rows of b that a task takes
  uint32_t *packed;              // a, turned around
};

struct ProductLoops {
  int32_t rows;  // of a tile
  int (*width)(const ProductJob &);  // tokens of a strip
  size_t (*scratch_bytes)(const ProductJob &);  // of one thread
  void (*pack)(const ProductJob &, int strip);
  void (*multiply)(const ProductJob &, int task, char *scratch);
};

struct Scheme {  // everything that is compiled per instruction set and dtype
  Loops ffn;
  LowRankLoops low_rank;
};

struct Isa {
  const char *name;
  bool (*supported)();
  const Scheme *f32, *bf16;
  const Loops *int8_f32, *int8_bf16;  // weights in eight bits, all else in that type
  const ProductLoops *product;
  TopK *top_k;
  const PackedLoops *packed;  // kPackedKinds
};

// One per translation unit.
extern const Scheme amx_bf16, avx512_bf16_bf16, avx512_f32, avx512_bf16_via_f32, avx2_f32, avx2_bf16_via_f32, portable_f32,
    portable_bf16_via_f32;
extern const Loops amx_int8_f32, amx_int8_bf16, avx512_vnni_int8_f32, avx512_vnni_int8_bf16, avx_vnni_int8_f32, avx_vnni_int8_bf16, avx2_int8_f32,
    avx2_int8_bf16, portable_int8_f32, portable_int8_bf16;
extern const ProductLoops avx512_vnni_product, avx_vnni_product, avx2_product, portable_product;
extern TopK avx512_top_k, avx2_top_k, portable_top_k;
extern const PackedLoops avx512_packed[kPackedKinds], avx2_packed[kPackedKinds], portable_packed[kPackedKinds];

}  // namespace fastfill
