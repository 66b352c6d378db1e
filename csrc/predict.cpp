// The drivers of what goes on around the sparse FFN: block scores, selection, compensator.
#include <limits>
#include <new>

#include "driver.h"
#include "fastfill.h"

namespace fastfill {
namespace {

constexpr int kStripBytes = 512 * 1024;  // share of a core's L2 that the outputs of a strip may take
constexpr int kStripTokens = 96;

struct LowRankPass {
  const LowRankLoops *loops;
  LowRankJob job;
  float padding;
};

int32_t low_rank(const fastfill_low_rank_call *call, bool scores) {
  const Isa *isa = find_isa(call->isa);
  if (!isa) return FASTFILL_BAD_ISA;
  const bool bf16 = call->dtype == FASTFILL_BF16;
  const int element = bf16 ? 2 : 4, threads = at_least_one(call->threads);
  if (call->tokens == 0 || call->columns == 0) return FASTFILL_OK;

  // Softmax must not see the columns that fill the last panel: exp(-inf) is 0.
  LowRankPass pass{bf16 ? &isa->bf16->low_rank : &isa->f32->low_rank, {}, scores ? -std::numeric_limits<float>::infinity() : 0.0f};
  LowRankJob &j = pass.job;
  j.x = static_cast<const char *>(call->x), j.x_stride = call->x_stride * element;
  j.w_in = static_cast<const char *>(call->w_in), j.w_in_stride = call->w_in_stride * element;
  j.w_out = static_cast<const char *>(call->w_out), j.w_out_stride = call->w_out_stride * element;
  j.bias = static_cast<const char *>(call->bias);
  j.out = static_cast<char *>(call->out), j.out_stride = call->out_stride * (scores ? 4 : element);
  j.tokens = call->tokens;
  j.hidden = (int32_t)call->hidden, j.rank = (int32_t)call->rank, j.columns = (int32_t)call->columns;
  j.block_size = (int32_t)call->block_size, j.linear_rank = (int32_t)call->linear_rank;
  const int64_t fits = kStripBytes / 4 / call->columns;
  j.strip = (int32_t)(fits < kStripTokens ? fits : kStripTokens);
  if (j.strip < pass.loops->rows) j.strip = pass.loops->rows;
  const int64_t share = scores ? j.block_size : (j.tokens + threads - 1) / threads;
  if (j.strip > share) j.strip = (int32_t)share;

  const size_t panels = align64(pass.loops->panel_bytes(j)), per_thread = align64(pass.loops->scratch_bytes(j));
  Scratch scratch(panels + per_thread * threads);
  if (!scratch.ok()) return FASTFILL_NO_MEMORY;
  j.panels = scratch.data();
  parallel(threads, pass.loops->pack_tasks(j), scratch.data(), 0, &pass, [](void *p, int task, char *) {
    const LowRankPass &pass = *static_cast<LowRankPass *>(p);
    pass.loops->pack(pass.job, task, pass.padding);
  });
  if (scores)
    parallel(threads, (int)(j.tokens / j.block_size), scratch.data() + panels, per_thread, &pass,
             [](void *p, int task, char *mine) {
               const LowRankPass &pass = *static_cast<LowRankPass *>(p);
               pass.loops->scores(pass.job, task, mine);
             });
  else
    parallel(threads, ceil_div(j.tokens, j.strip), scratch.data() + panels, per_thread, &pass,
             [](void *p, int task, char *mine) {
               const LowRankPass &pass = *static_cast<LowRankPass *>(p);
               pass.loops->compensate(pass.job, task, mine);
             });
  return FASTFILL_OK;
}

struct TopKPass {
  TopK *loop;
  TopKJob job;
};

int32_t top_k(const fastfill_top_k_call *call) {
  const Isa *isa = find_isa(call->isa);
  if (!isa) return FASTFILL_BAD_ISA;
  const int threads = at_least_one(call->threads);
  TopKPass pass{isa->top_k,
                {call->scores, call->scores_stride, (int32_t)call->neurons, (int32_t)call->kept, call->ids}};
  const size_t per_thread = align64((size_t)call->neurons * 4 + 64);
  Scratch scratch(per_thread * threads);
  if (!scratch.ok()) return FASTFILL_NO_MEMORY;
  parallel(threads, (int)call->rows, scratch.data(), per_thread, &pass, [](void *p, int task, char *mine) {
    const TopKPass &pass = *static_cast<TopKPass *>(p);
    pass.loop(pass.job, task, mine);
  });
  return FASTFILL_OK;
}

constexpr int kRoundRows = 16;  // of a task

int32_t round_rows(const fastfill_round_call *call) {
  const Isa *isa = find_isa(call->isa);
  if (!isa) return FASTFILL_BAD_ISA;
  struct Pass {
    const fastfill_round_call *call;
    const Loops *loops;
    int element;
  } pass{call, call->dtype == FASTFILL_BF16 ? isa->int8_bf16 : isa->int8_f32, call->dtype == FASTFILL_BF16 ? 2 : 4};
  parallel(at_least_one(call->threads), ceil_div(call->rows, kRoundRows), nullptr, 0, &pass, [](void *p, int task, char *) {
    const Pass &pass = *static_cast<Pass *>(p);
    const fastfill_round_call &c = *pass.call;
    for (int64_t row = (int64_t)task * kRoundRows; row < c.rows && row < (int64_t)(task + 1) * kRoundRows; row++) {
      const char *from = static_cast<const char *>(c.x) + row * c.x_stride * pass.element;
      c.scale[row] = pass.loops->round_row(from, (int)c.columns, reinterpret_cast<char *>(c.q) + row * c.columns);
    }
  });
  return FASTFILL_OK;
}

}  // namespace
}  // namespace fastfill

FASTFILL_API int32_t fastfill_round(const fastfill_round_call *call) { return fastfill::round_rows(call); }

FASTFILL_API int32_t fastfill_block_scores(const fastfill_low_rank_call *call) {
  try {
    return fastfill::low_rank(call, true);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
FASTFILL_API int32_t fastfill_compensate(const fastfill_low_rank_call *call) {
  try {
    return fastfill::low_rank(call, false);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
FASTFILL_API int32_t fastfill_top_k(const fastfill_top_k_call *call) {
  try {
    return fastfill::top_k(call);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
