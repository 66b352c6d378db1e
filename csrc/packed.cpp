// The drivers of what is done with packed weights (packed.h): rows are independent, each is one thread's.
#include <cstring>
#include <new>

#include "driver.h"
#include "fastfill.h"
#include "scalar.h"

namespace fastfill {
namespace {

constexpr int kRows = 16;            // of a task
constexpr int kTurned = 64;          // rows that are transposed at a time: a cache line of the result
constexpr int kStripRows = 128;      // of a task, transposed
constexpr int kStripColumns = 512;   // a strip stays in L2
constexpr int kStripStride = kStripColumns + 64;  // rows that lie a power of two apart would share too few lines of L1
constexpr int kDotColumns = 2048, kDotTokens = 8;  // what they take of x stays in L2, that of four tokens in L1

struct Pass {
  const fastfill_packed_call *call;
  const PackedLoops *loops;
  float *x;  // linear: in fp32, chunk by chunk
  int blocks;

  const uint8_t *row(int64_t i) const { return static_cast<const uint8_t *>(call->blocks) + i * call->blocks_stride; }
  int64_t bytes(int64_t columns) const { return columns / loops->columns * loops->bytes; }
  int64_t end(int task, int rows) const {
    const int64_t end = (int64_t)(task + 1) * rows;
    return end < call->rows ? end : call->rows;
  }
};

const PackedLoops *find_loops(const Isa *isa, int32_t kind) {
  for (int i = 0; i < kPackedKinds; i++)
    if (isa->packed[i].kind == kind) return isa->packed + i;
  return nullptr;
}

int32_t prepare(const fastfill_packed_call *call, Pass *pass) {
  const Isa *isa = find_isa(call->isa);
  if (!isa) return FASTFILL_BAD_ISA;
  const PackedLoops *loops = find_loops(isa, call->kind);
  if (!loops) return FASTFILL_BAD_KIND;
  *pass = {call, loops, nullptr, (int)(call->columns / loops->columns)};
  return FASTFILL_OK;
}

void run(const Pass &pass, int rows, char *scratch, size_t scratch_bytes, void (*body)(void *, int, char *)) {
  parallel(at_least_one(pass.call->threads), ceil_div(pass.call->rows, rows), scratch, scratch_bytes,
           const_cast<Pass *>(&pass), body);
}

int32_t unpack(const fastfill_packed_call *call) {
  Pass pass;
  if (const int32_t bad = prepare(call, &pass)) return bad;
  run(pass, kRows, nullptr, 0, [](void *p, int task, char *) {
    const Pass &pass = *static_cast<Pass *>(p);
    const fastfill_packed_call &c = *pass.call;
    for (int64_t i = (int64_t)task * kRows; i < pass.end(task, kRows); i++) {
      if (c.dtype == FASTFILL_BF16)
        pass.loops->unpack_bf16(pass.row(i), pass.blocks, static_cast<char *>(c.out) + i * c.out_stride * 2);
      else
        pass.loops->unpack(pass.row(i), pass.blocks, static_cast<float *>(c.out) + i * c.out_stride);
    }
  });
  return FASTFILL_OK;
}

int32_t scales(const fastfill_packed_call *call) {
  Pass pass;
  if (const int32_t bad = prepare(call, &pass)) return bad;
  run(pass, kRows, nullptr, 0, [](void *p, int task, char *) {
    const Pass &pass = *static_cast<Pass *>(p);
    for (int64_t i = (int64_t)task * kRows; i < pass.end(task, kRows); i++)
      pass.loops->scales(pass.row(i), pass.blocks, pass.call->scale + i, pass.call->inverse + i);
  });
  return FASTFILL_OK;
}

void round_row(const Pass &pass, int64_t i, int first, int blocks, int8_t *to) {
  const float inverse = pass.call->inverse[i];
  if (inverse == 0)  // a row of zeros, or one that is not finite
    memset(to, 0, (size_t)blocks * pass.loops->columns);
  else
    pass.loops->round(pass.row(i) + (size_t)first * pass.loops->bytes, blocks, inverse, to);
}

// Rows [row, end), at most kStripRows, become columns.
void round_strip(const Pass &pass, int64_t row, int64_t end, int8_t *strip) {
  const fastfill_packed_call &c = *pass.call;
  const int width = pass.loops->columns, step = kStripColumns / width, n = (int)(end - row);
  for (int first = 0; first < pass.blocks; first += step) {
    const int blocks = pass.blocks - first < step ? pass.blocks - first : step;
    for (int i = 0; i < n; i++) round_row(pass, row + i, first, blocks, strip + i * kStripStride);
    int8_t *out = static_cast<int8_t *>(c.out) + (int64_t)first * width * c.out_stride + row;
    for (int column = 0; column < blocks * width; column += 16) {
      int8_t *to = out + column * c.out_stride;
      int i = 0;
      for (; i + kTurned <= n; i += kTurned)
        pass.loops->transpose(strip + i * kStripStride + column, kStripStride, to + i, c.out_stride);
      for (; i < n; i++)
        for (int k = 0; k < 16; k++) to[k * c.out_stride + i] = strip[i * kStripStride + column + k];
    }
  }
}

int32_t unpack_int8(const fastfill_packed_call *call) {
  Pass pass;
  if (const int32_t bad = prepare(call, &pass)) return bad;
  if (!call->transposed) {
    run(pass, kRows, nullptr, 0, [](void *p, int task, char *) {
      const Pass &pass = *static_cast<Pass *>(p);
      for (int64_t i = (int64_t)task * kRows; i < pass.end(task, kRows); i++)
        round_row(pass, i, 0, pass.blocks, static_cast<int8_t *>(pass.call->out) + i * pass.call->out_stride);
    });
    return FASTFILL_OK;
  }
  const size_t per_thread = kStripRows * kStripStride;
  Scratch scratch(per_thread * at_least_one(call->threads));
  if (!scratch.ok()) return FASTFILL_NO_MEMORY;
  run(pass, kStripRows, scratch.data(), per_thread, [](void *p, int task, char *mine) {
    const Pass &pass = *static_cast<Pass *>(p);
    round_strip(pass, (int64_t)task * kStripRows, pass.end(task, kStripRows), reinterpret_cast<int8_t *>(mine));
  });
  return FASTFILL_OK;
}

int64_t chunk_columns(const Pass &pass, int64_t column) {
  const int64_t left = pass.call->columns - column;
  return left < kDotColumns ? left : kDotColumns;
}

// Rows are read in pieces, which no processor foresees: without this a long row takes half as long again.
void fetch(const uint8_t *from, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
#else
  (void)from, (void)bytes;
#endif
}

// x in fp32: for each chunk of columns those of all tokens.
void widen(const Pass &pass) {
  const fastfill_packed_call &c = *pass.call;
  float *to = pass.x;
  for (int64_t column = 0, n; column < c.columns; column += n) {
    n = chunk_columns(pass, column);
    for (int64_t t = 0; t < c.tokens; t++, to += n) {
      const int64_t at = t * c.x_stride + column;
      if (c.dtype == FASTFILL_BF16)
        Bf16ViaF32::unpack(static_cast<const char *>(c.x) + at * 2, (int)n, to);
      else
        memcpy(to, static_cast<const float *>(c.x) + at, (size_t)n * 4);
    }
  }
}

// Rows [row, end), at most kRows. All rows are multiplied with a chunk of x before the next one.
void linear_rows(const Pass &pass, int64_t row, int64_t end, float *sums) {
  const fastfill_packed_call &c = *pass.call;
  const int tokens = (int)c.tokens;
  memset(sums, 0, (size_t)kRows * tokens * 4);
  for (int64_t column = 0, n; column < c.columns; column += n) {
    n = chunk_columns(pass, column);
    const bool last = column + n == c.columns;  // then the task after this one is next
    const int64_t next = last ? 0 : column + n, down = last ? kRows : 0, next_bytes = pass.bytes(chunk_columns(pass, next));
    for (int t = 0; t < tokens; t += kDotTokens) {
      const float *x = pass.x + column * tokens + t * n;
      const int count = tokens - t < kDotTokens ? tokens - t : kDotTokens;
      for (int64_t i = row; i < end; i++) {
        if (t == 0 && i + down < c.rows) fetch(pass.row(i + down) + pass.bytes(next), next_bytes);
        const int blocks = (int)(n / pass.loops->columns);
        pass.loops->dots(pass.row(i) + pass.bytes(column), blocks, x, count, sums + (i - row) * tokens + t);
      }
    }
  }
  for (int64_t i = row; i < end; i++)
    for (int t = 0; t < tokens; t++) {
      const float sum = sums[(i - row) * tokens + t];
      if (c.dtype == FASTFILL_BF16)
        float_to_bf16(sum, static_cast<char *>(c.out) + (t * c.out_stride + i) * 2);
      else
        static_cast<float *>(c.out)[t * c.out_stride + i] = sum;
    }
}

int32_t linear(const fastfill_packed_call *call) {
  Pass pass;
  if (const int32_t bad = prepare(call, &pass)) return bad;
  if (call->tokens == 0) return FASTFILL_OK;
  const size_t x_bytes = align64((size_t)call->tokens * call->columns * 4);
  const size_t per_thread = align64((size_t)kRows * call->tokens * 4);
  Scratch scratch(x_bytes + per_thread * at_least_one(call->threads));
  if (!scratch.ok()) return FASTFILL_NO_MEMORY;
  pass.x = reinterpret_cast<float *>(scratch.data());
  widen(pass);
  run(pass, kRows, scratch.data() + x_bytes, per_thread, [](void *p, int task, char *mine) {
    const Pass &pass = *static_cast<Pass *>(p);
    linear_rows(pass, (int64_t)task * kRows, pass.end(task, kRows), reinterpret_cast<float *>(mine));
  });
  return FASTFILL_OK;
}

}  // namespace
}  // namespace fastfill

FASTFILL_API int32_t fastfill_unpack(const fastfill_packed_call *call) { return fastfill::unpack(call); }
FASTFILL_API int32_t fastfill_packed_scales(const fastfill_packed_call *call) { return fastfill::scales(call); }
FASTFILL_API int32_t fastfill_unpack_int8(const fastfill_packed_call *call) {
  try {
    return fastfill::unpack_int8(call);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
FASTFILL_API int32_t fastfill_packed_linear(const fastfill_packed_call *call) {
  try {
    return fastfill::linear(call);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
