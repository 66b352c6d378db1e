// C ABI of the native kernels: plain pointers, strides and sizes, so that one library serves every torch.
// kernels/cpu.py mirrors the structures field by field.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define FASTFILL_API extern "C" __declspec(dllexport)
#else
#define FASTFILL_API extern "C" __attribute__((visibility("default")))
#endif

constexpr int32_t FASTFILL_INTERFACE = 5;  // to be raised with every change here; kernels/cpu.py refuses any other

enum : int32_t { FASTFILL_F32 = 0, FASTFILL_BF16 = 1 };
enum : int32_t { FASTFILL_SILU = 0, FASTFILL_GELU = 1, FASTFILL_GELU_TANH = 2, FASTFILL_RELU = 3 };
enum : int32_t {
  FASTFILL_OK = 0,
  FASTFILL_BAD_RANGE = 1,
  FASTFILL_BAD_ORDER = 2,
  FASTFILL_NO_MEMORY = 3,
  FASTFILL_BAD_ISA = 4,
  FASTFILL_BAD_KIND = 5
};

// With gate_scale the weights are int8: gate's and up's rows times gate_scale, up_scale (neurons), down_t's columns times
// down_scale (hidden), all fp32. x is rounded to eight bits with a scale per token, h with one per token and chunk of
// FASTFILL_H_CHUNK neurons; sums are exact.
constexpr int64_t FASTFILL_H_CHUNK = 1024;

// y = init + (act(x @ gate[ids].T + gate_bias[ids]) * (x @ up[ids].T + up_bias[ids])) @ down_t[ids] per block. All row
// strides count elements; the stride along H, and of the biases, is 1 everywhere. Block n has tokens rows[n]..rows[n+1] and ids[id_offsets[n]..id_offsets[n+1]].
struct fastfill_call {
  const void *x, *gate, *up, *down_t, *gate_bias, *up_bias, *init;  // biases, of all neurons, and init may be null
  const float *gate_scale, *up_scale, *down_scale;                  // null: the weights are of the dtype
  void *out;
  const void *ids;
  const int64_t *rows, *id_offsets;  // n_blocks + 1 each
  int64_t x_stride, gate_stride, up_stride, down_stride, init_stride, out_stride;
  int64_t hidden, neurons, n_blocks;
  int32_t dtype, activation, ids_are_64bit, threads;
  const char *isa;    // null or "": the best one this processor has
  int64_t bad_block;  // out: the block whose ids were refused
};

// Predictor: out = block sums of softmax(x @ w_in.T @ w_out.T + bias), fp32 (tokens / block_size, columns).
// Compensator: out = a @ w_out.T + bias, (tokens, columns) in the dtype; a = x @ w_in.T, SiLU on those >= linear_rank.
// w_in is (rank, hidden), w_out (columns, rank), bias (columns). Strides as above.
struct fastfill_low_rank_call {
  const void *x, *w_in, *w_out, *bias;
  void *out;
  int64_t x_stride, w_in_stride, w_out_stride, out_stride;
  int64_t tokens, hidden, rank, columns, block_size, linear_rank;
  int32_t dtype, threads;
  const char *isa;
};

// The `kept` largest of each row of scores (rows, neurons), ids rising; of equal ones the lowest ids; NaN is infinity.
struct fastfill_top_k_call {
  const float *scores;
  int32_t *ids;  // (rows, kept)
  int64_t scores_stride, rows, neurons, kept;
  int32_t threads;
  const char *isa;
};

// Rows in eight bits: q (rows, columns) int8, and the scale of each row; see csrc/int8.h.
struct fastfill_round_call {
  const void *x;
  int8_t *q;
  float *scale;
  int64_t x_stride, rows, columns;
  int32_t dtype, threads;
  const char *isa;
};

// out (tokens, rows), fp32: sums over columns of a (tokens, columns) times b (rows, columns), exact and rounded once. a has no
// -128 (csrc/int8_avx2.cpp); columns are at most 2^16: more could leave 32 bits.
struct fastfill_product_call {
  const int8_t *a, *b;
  float *out;
  int64_t a_stride, b_stride, out_stride;
  int64_t tokens, rows, columns;
  int32_t threads;
  const char *isa;
};

// Rows (rows, columns) of weights in blocks as GGUF files hold them, `kind` by its numbers; columns are whole blocks.
// unpack: out (rows, columns) in the dtype. packed_scales: scale and inverse (rows), as csrc/int8.h has them.
// unpack_int8: out int8 (rows, columns), or transposed (columns, rows); each row times its inverse, to nearest, ties to even;
// zeros where the inverse is 0. packed_linear: out (tokens, rows) = x (tokens, columns) @ weights.T, sums in fp32.
struct fastfill_packed_call {
  const void *blocks, *x;
  void *out;
  float *scale, *inverse;
  int64_t blocks_stride;  // bytes
  int64_t x_stride, out_stride;
  int64_t rows, columns, tokens;
  int32_t kind, dtype, transposed, threads;
  const char *isa;
};

FASTFILL_API int32_t fastfill_interface();                       // FASTFILL_INTERFACE, as the library was built
FASTFILL_API int32_t fastfill_sparse_ffn(fastfill_call *call);
FASTFILL_API int32_t fastfill_block_scores(const fastfill_low_rank_call *call);
FASTFILL_API int32_t fastfill_compensate(const fastfill_low_rank_call *call);
FASTFILL_API int32_t fastfill_top_k(const fastfill_top_k_call *call);
FASTFILL_API int32_t fastfill_round(const fastfill_round_call *call);
FASTFILL_API int32_t fastfill_product(const fastfill_product_call *call);
FASTFILL_API int32_t fastfill_unpack(const fastfill_packed_call *call);
FASTFILL_API int32_t fastfill_packed_scales(const fastfill_packed_call *call);
FASTFILL_API int32_t fastfill_unpack_int8(const fastfill_packed_call *call);
FASTFILL_API int32_t fastfill_packed_linear(const fastfill_packed_call *call);
FASTFILL_API int64_t fastfill_scratch_bytes();                   // memory that is kept between calls, or in use
FASTFILL_API void fastfill_release();                            // frees what of it no call is using
FASTFILL_API int32_t fastfill_isa_count();
FASTFILL_API const char *fastfill_isa_name(int32_t index);       // best first
FASTFILL_API int32_t fastfill_isa_supported(int32_t index);      // by this processor and operating system
FASTFILL_API void fastfill_use_gomp(void *gomp_parallel);        // address of GOMP_parallel of torch's own pool
