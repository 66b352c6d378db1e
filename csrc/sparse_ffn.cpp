// The driver of the sparse FFN: checks the ids, cuts the work into tasks and runs them on the threads.
#include <new>
#include <vector>

#include "driver.h"
#include "fastfill.h"

namespace fastfill {
namespace {

constexpr int kMaxTokens = 2048;      // tokens per pass over the weights: bounds scratch memory

template <class Id>
int copy_ids(const Id *from, int64_t n, int64_t neurons, int32_t *to) {
  int64_t last = -1;
  bool range = true, order = true;
  for (int64_t i = 0; i < n; i++) {
    const int64_t id = from[i];
    range &= id >= 0 && id < neurons;
    order &= id > last;
    last = id;
    to[i] = (int32_t)id;
  }
  return !range ? FASTFILL_BAD_RANGE : !order ? FASTFILL_BAD_ORDER : FASTFILL_OK;
}

void plan(Job &j, const Sizes &s, int threads) {
  // First half: a chunk's gate and up rows fill their share of L2; the chunks go evenly into the threads.
  const int units = ceil_div(j.hidden, s.per_unit);
  int chunk = s.chunk / (units * 8 + 64);
  if (chunk > ceil_div(j.neurons, 4 * threads)) chunk = ceil_div(j.neurons, 4 * threads);
  if (chunk < 24) chunk = 24;
  j.n_chunks = ceil_div(ceil_div(j.neurons, chunk), threads) * threads;
  j.chunk = at_least_one(ceil_div(j.neurons, at_least_one(j.n_chunks)));
  j.n_chunks = at_least_one(ceil_div(j.neurons, j.chunk));
  // Second half: f_chunk neurons of a tile of columns; the half of them that a block wants, and its h, fit L1.
  const int line = s.tile_columns * s.element;
  j.n_f_chunks = at_least_one(ceil_div((int64_t)j.neurons * line, s.panel));
  j.f_chunk = at_least_one(ceil_div(j.neurons, j.n_f_chunks));
  if (j.gate_scale) {  // h has a scale for each of these chunks: they must not depend on the instruction set
    j.f_chunk = FASTFILL_H_CHUNK;
    j.n_f_chunks = at_least_one(ceil_div(j.neurons, FASTFILL_H_CHUNK));
  }
}

int64_t block_of_group(const Job &j, int64_t g) { return j.n_blocks * g / j.n_groups; }

void set_groups(Job &j, int groups) {
  j.n_groups = groups < j.n_blocks ? groups : j.n_blocks;
  j.group_tokens = 0;
  for (int g = 0; g < j.n_groups; g++) {
    const Block &first = j.blocks[block_of_group(j, g)], &last = j.blocks[block_of_group(j, g + 1) - 1];
    const int tokens = (int)(last.row0 + last.tokens - first.row0);
    if (tokens > j.group_tokens) j.group_tokens = tokens;
  }
}

// Second half: how many column tiles make a task, and into how many groups the blocks are split. Few and large tasks
// leave threads idle at the end; narrow ones visit each row of down more often, many groups pack more.
// 576 x 1536 on two threads: 3 x 3 tasks keep one thread waiting for 10 % of the time, 6 x 2 do not.
void plan_down(Job &j, const Sizes &s, int threads) {
  const int tiles = ceil_div(j.hidden, s.tile_columns);
  double best = 1e30;
  int best_groups = 1;
  for (int c = tiles < s.most_tiles ? tiles : s.most_tiles; c >= 1; c--) {
    if (c > 1 && ceil_div(tiles, c - 1) == ceil_div(tiles, c)) continue;  // as many tasks, each wider
    for (int groups = 1; groups <= j.n_blocks && groups <= 2 * threads; groups++) {
      const int tasks = ceil_div(tiles, c) * groups;
      const double cost = (double)ceil_div(tasks, threads) * c / groups * (1 + 0.02 * groups + s.narrow / c);
      if (cost < best) best = cost, j.c_tiles = c, best_groups = groups;
    }
  }
  j.n_c_chunks = ceil_div(tiles, j.c_tiles);
  set_groups(j, best_groups);
}

struct Pass {
  const Loops *loops;
  Job job;
};

int32_t run(fastfill_call *call) {
  const Isa *isa = find_isa(call->isa);
  if (!isa) return FASTFILL_BAD_ISA;
  const bool bf16 = call->dtype == FASTFILL_BF16, int8 = call->gate_scale != nullptr;
  const Loops *loops = int8 ? bf16 ? isa->int8_bf16 : isa->int8_f32 : bf16 ? &isa->bf16->ffn : &isa->f32->ffn;
  const Sizes &s = loops->sizes;
  const int element = bf16 ? 2 : 4, weight = int8 ? 1 : element;
  const int threads = call->threads < 1 ? 1 : call->threads;

  const int64_t n_ids = call->id_offsets[call->n_blocks];
  std::vector<int32_t> ids(n_ids);
  for (int64_t n = 0; n < call->n_blocks; n++) {
    const int64_t a = call->id_offsets[n], k = call->id_offsets[n + 1] - a;
    const int bad = call->ids_are_64bit
                        ? copy_ids(static_cast<const int64_t *>(call->ids) + a, k, call->neurons, ids.data() + a)
                        : copy_ids(static_cast<const int32_t *>(call->ids) + a, k, call->neurons, ids.data() + a);
    if (bad) {
      call->bad_block = n;
      return bad;
    }
  }

  std::vector<Block> blocks;
  for (int64_t n = 0; n < call->n_blocks; n++) {
    const int64_t row0 = call->rows[n], tokens = call->rows[n + 1] - row0;
    const int pieces = ceil_div(tokens, kMaxBlock);
    for (int i = 0; i < pieces; i++) {
      Block b{};
      b.row0 = row0 + tokens * i / pieces;
      b.tokens = (int32_t)(row0 + tokens * (i + 1) / pieces - b.row0);
      b.padded = ceil_div(b.tokens, s.lanes) * s.lanes;
      b.ids = ids.data() + call->id_offsets[n];
      b.k = (int32_t)(call->id_offsets[n + 1] - call->id_offsets[n]);
      blocks.push_back(b);
    }
  }
  if (blocks.empty() || call->hidden == 0) return FASTFILL_OK;

  Pass pass{loops, {}};
  Job &j = pass.job;
  j.x = static_cast<const char *>(call->x), j.x_stride = call->x_stride * element;
  j.gate = static_cast<const char *>(call->gate), j.gate_stride = call->gate_stride * weight;
  j.up = static_cast<const char *>(call->up), j.up_stride = call->up_stride * weight;
  j.down_t = static_cast<const char *>(call->down_t), j.down_stride = call->down_stride * weight;
  j.gate_bias = static_cast<const char *>(call->gate_bias), j.up_bias = static_cast<const char *>(call->up_bias);
  j.gate_scale = call->gate_scale, j.up_scale = call->up_scale, j.down_scale = call->down_scale;
  j.init = static_cast<const char *>(call->init), j.init_stride = call->init_stride * element;
  j.out = static_cast<char *>(call->out), j.out_stride = call->out_stride * element;
  j.hidden = (int32_t)call->hidden, j.neurons = (int32_t)call->neurons, j.activation = call->activation;
  j.threads = threads;
  plan(j, s, threads);

  for (size_t begin = 0; begin < blocks.size();) {
    size_t end = begin, x_units = 0, h_units = 0, q_units = 0, padded = 0;
    int64_t tokens = 0;
    for (; end < blocks.size() && (end == begin || tokens + blocks[end].tokens <= kMaxTokens); end++) {
      Block &b = blocks[end];
      b.x_at = x_units, b.h_at = h_units, b.q_at = q_units, b.t_at = padded;
      x_units += (size_t)ceil_div(j.hidden, s.step) * (s.step / s.per_unit) * b.padded;
      h_units += (size_t)(int8 ? b.k : ceil_div(b.k, s.step) * (s.step / s.per_unit)) * b.padded;
      q_units += int8 ? (size_t)(b.k / s.step + j.n_f_chunks) * (s.step / s.per_unit) * b.padded : 0;
      padded += b.padded;
      tokens += b.tokens;
    }
    const size_t chunk_tokens = int8 ? padded * j.n_f_chunks : 0;
    j.blocks = blocks.data() + begin, j.n_blocks = (int32_t)(end - begin);

    set_groups(j, j.n_chunks >= 4 * threads ? 1 : ceil_div(4 * threads, j.n_chunks));
    const int gate_groups = j.n_groups;
    const size_t gate_bytes = align64(loops->gate_up_bytes(j));
    plan_down(j, s, threads);
    const size_t down_bytes = align64(loops->down_bytes(j));
    const size_t per_thread = gate_bytes > down_bytes ? gate_bytes : down_bytes;
    const size_t scales = int8 ? padded : 0;
    size_t bytes = per_thread * threads;
    for (size_t units : {x_units, h_units, q_units, scales, chunk_tokens, chunk_tokens}) bytes += align64(units * 4);
    Scratch scratch(bytes);
    if (!scratch.ok()) return FASTFILL_NO_MEMORY;
    char *rest = scratch.data();
    const auto take = [&rest](size_t units) {
      char *mine = rest;
      rest += align64(units * 4);
      return mine;
    };
    j.xp = reinterpret_cast<uint32_t *>(take(x_units)), j.h = reinterpret_cast<uint32_t *>(take(h_units));
    j.hq = reinterpret_cast<uint32_t *>(take(q_units));
    j.x_scale = reinterpret_cast<float *>(take(scales));
    j.h_scale = reinterpret_cast<float *>(take(chunk_tokens));
    j.h_start = reinterpret_cast<int32_t *>(take(chunk_tokens));

    const int down_groups = j.n_groups;
    parallel(threads, j.n_blocks, rest, 0, &pass, [](void *p, int task, char *) {
      static_cast<Pass *>(p)->loops->pack_x(static_cast<Pass *>(p)->job, task);
    });
    j.n_groups = gate_groups;
    parallel(threads, j.n_chunks * gate_groups, rest, per_thread, &pass, [](void *p, int task, char *mine) {
      static_cast<Pass *>(p)->loops->gate_up(static_cast<Pass *>(p)->job, task, mine);
    });
    if (int8)
      parallel(threads, j.n_blocks * j.n_f_chunks, rest, 0, &pass, [](void *p, int task, char *) {
        static_cast<Pass *>(p)->loops->quantise_h(static_cast<Pass *>(p)->job, task);
      });
    j.n_groups = down_groups;
    parallel(threads, j.n_c_chunks * down_groups, rest, per_thread, &pass, [](void *p, int task, char *mine) {
      static_cast<Pass *>(p)->loops->down(static_cast<Pass *>(p)->job, task, mine);
    });
    begin = end;
  }
  return FASTFILL_OK;
}

}  // namespace
}  // namespace fastfill

FASTFILL_API int32_t fastfill_interface() { return FASTFILL_INTERFACE; }

FASTFILL_API int32_t fastfill_sparse_ffn(fastfill_call *call) {
  try {
    return fastfill::run(call);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
