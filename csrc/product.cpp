// The driver of the product of two int8 matrices (product.h).
#include <new>

#include "driver.h"
#include "fastfill.h"

namespace fastfill {
namespace {

constexpr int kChunkBytes = 128 * 1024;  // of rows of b: they stay in L2 beside the tokens that pass

struct ProductPass {
  const ProductLoops *loops;
  ProductJob job;
};

int32_t product(const fastfill_product_call *call) {
  const Isa *isa = find_isa(call->isa);
  if (!isa) return FASTFILL_BAD_ISA;
  if (call->tokens == 0 || call->rows == 0) return FASTFILL_OK;
  const int threads = at_least_one(call->threads);
  ProductPass pass{isa->product, {}};
  ProductJob &j = pass.job;
  j.a = call->a, j.b = call->b, j.out = call->out;
  j.a_stride = call->a_stride, j.b_stride = call->b_stride, j.out_stride = call->out_stride;
  j.tokens = call->tokens, j.rows = (int32_t)call->rows, j.columns = (int32_t)call->columns;
  const int tile = pass.loops->rows, fit = kChunkBytes / (j.columns + 64) / tile, share = ceil_div(j.rows, 2 * threads * tile);
  j.chunk = at_least_one(fit < share ? fit : share) * tile;

  const int strip = pass.loops->width(j), strips = ceil_div(j.tokens, strip);
  const size_t packed = align64((size_t)strips * strip * ceil_div(j.columns, 4) * 4);
  const size_t per_thread = align64(pass.loops->scratch_bytes(j));
  Scratch scratch(packed + per_thread * threads);
  if (!scratch.ok()) return FASTFILL_NO_MEMORY;
  j.packed = reinterpret_cast<uint32_t *>(scratch.data());
  parallel(threads, strips, scratch.data(), 0, &pass, [](void *p, int task, char *) {
    static_cast<ProductPass *>(p)->loops->pack(static_cast<ProductPass *>(p)->job, task);
  });
  parallel(threads, ceil_div(j.rows, j.chunk), scratch.data() + packed, per_thread, &pass, [](void *p, int task, char *mine) {
    static_cast<ProductPass *>(p)->loops->multiply(static_cast<ProductPass *>(p)->job, task, mine);
  });
  return FASTFILL_OK;
}

}  // namespace
}  // namespace fastfill

FASTFILL_API int32_t fastfill_product(const fastfill_product_call *call) {
  try {
    return fastfill::product(call);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
