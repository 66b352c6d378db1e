// The driver: picks the instruction set, checks the ids, cuts the work into tasks and runs them on the threads.
#include "fastfill.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/mman.h>
#endif

#include "job.h"

namespace fastfill {
namespace {

#if defined(FASTFILL_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

const Isa kIsas[] = {  // best first
#if defined(FASTFILL_X86)
    {"avx512_bf16", has_avx512_bf16, &avx512_f32, &avx512_bf16_bf16},
    {"avx512", has_avx512, &avx512_f32, &avx512_bf16_via_f32},
    {"avx2", has_avx2, &avx2_f32, &avx2_bf16_via_f32},
#endif
    {"portable", always, &portable_f32, &portable_bf16_via_f32},
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

const Isa *find_isa(const char *name) {
  for (const Isa &isa : kIsas)
    if ((!name || !*name || !strcmp(name, isa.name)) && isa.supported()) return &isa;
  return nullptr;
}

// ---- threads ------------------------------------------------------------------------------------------------------

// torch's threads belong to the OpenMP library it brought along, and they spin for a while after each of its ops: a
// second pool would fight them for the cores. So the region is opened through that library's own entry point, found by
// the binding. Without it, plain threads.
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Region {
  void (*body)(void *context, int task, char *scratch);
  void *context;
  int tasks;
  char *scratch;
  size_t scratch_bytes;
  std::atomic<int> next_task{0}, next_thread{0};
};

void work(void *p) {
  Region &r = *static_cast<Region *>(p);
  char *scratch = r.scratch + r.scratch_bytes * r.next_thread.fetch_add(1);
  for (int t; (t = r.next_task.fetch_add(1)) < r.tasks;) r.body(r.context, t, scratch);
}

// Tasks are handed out as threads become free. Which thread does which task changes no result.
void parallel(int threads, int tasks, char *scratch, size_t scratch_bytes, void *context,
              void (*body)(void *, int, char *)) {
  Region r;
  r.body = body, r.context = context, r.tasks = tasks, r.scratch = scratch, r.scratch_bytes = scratch_bytes;
  if (threads > tasks) threads = tasks;
  if (threads <= 1) return work(&r);
  if (GompParallel gomp = gomp_parallel.load()) return gomp(work, &r, threads, 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; i++) others.emplace_back(work, &r);
  } catch (const std::system_error &) {  // no more threads to be had: those that started do the work
  }
  work(&r);
  for (std::thread &t : others) t.join();
}

// ---- scratch memory -----------------------------------------------------------------------------------------------

// Kept between calls, because fresh pages cost about 0.25 us each: 5 % of a 576 x 1536 layer at 1,024 tokens.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = 0; i < free_.size(); i++)
        if (!mine_.data || free_[i].bytes > free_[at_].bytes) mine_ = free_[i], at_ = i;
      if (mine_.data) free_.erase(free_.begin() + at_);
    }
    if (mine_.bytes >= bytes) return;
    release(mine_.data);
    const size_t rounded = (bytes + bytes / 8 + kHuge - 1) / kHuge * kHuge;
    mine_ = {allocate(rounded), rounded};
  }
  ~Scratch() {
    if (!mine_.data) return;
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(mine_);
  }
  Scratch(const Scratch &) = delete;
  char *data() const { return static_cast<char *>(mine_.data); }
  bool ok() const { return mine_.data != nullptr; }

 private:
  static constexpr size_t kHuge = 2 << 20;
  struct Buffer {
    void *data = nullptr;
    size_t bytes = 0;
  };

  // Huge pages where the system grants them on request.
  static void *allocate(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, 64);
#else
    void *p = nullptr;
    if (posix_memalign(&p, kHuge, bytes)) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
#endif
  }
  static void release(void *p) {
#if defined(_WIN32)
    _aligned_free(p);
#else
    std::free(p);
#endif
  }

  Buffer mine_;
  size_t at_ = 0;
  // As many as calls have run at once; never destroyed, because threads may still call while the process ends.
  static std::mutex &mutex_;
  static std::vector<Buffer> &free_;
};
std::mutex &Scratch::mutex_ = *new std::mutex;
std::vector<Scratch::Buffer> &Scratch::free_ = *new std::vector<Scratch::Buffer>;

// ---- the call -----------------------------------------------------------------------------------------------------

constexpr int kMaxBlock = 512;        // longer blocks are cut: bounds the packed x that a core holds
constexpr int kMaxTokens = 2048;      // tokens per pass over the weights: bounds scratch memory
constexpr int kL2Bytes = 512 * 1024;  // share of a core's L2 that a packed chunk may take

size_t align64(size_t n) { return (n + 63) / 64 * 64; }
int ceil_div(int64_t a, int64_t b) { return (int)((a + b - 1) / b); }
int at_least_one(int n) { return n < 1 ? 1 : n; }

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
  int chunk = kL2Bytes / (units * 8 + 64);
  if (chunk > ceil_div(j.neurons, 4 * threads)) chunk = ceil_div(j.neurons, 4 * threads);
  if (chunk < 24) chunk = 24;
  j.n_chunks = ceil_div(ceil_div(j.neurons, chunk), threads) * threads;
  j.chunk = at_least_one(ceil_div(j.neurons, at_least_one(j.n_chunks)));
  j.n_chunks = at_least_one(ceil_div(j.neurons, j.chunk));
  // Second half: f_chunk neurons of a tile of columns are 32 KB, the half of them that a block wants fits L1.
  const int line = s.tile_columns * s.element;
  j.n_f_chunks = at_least_one(ceil_div((int64_t)j.neurons * line, 32 * 1024));
  j.f_chunk = at_least_one(ceil_div(j.neurons, j.n_f_chunks));
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
// leave threads idle at the end; narrow ones or many groups pack more and read h more often. 576 x 1536 on two threads:
// 3 x 3 tasks keep one thread waiting for 10 % of the time, 6 x 2 do not.
void plan_down(Job &j, const Sizes &s, int threads) {
  const int tiles = ceil_div(j.hidden, s.tile_columns);
  double best = 1e30;
  int best_groups = 1;
  for (int c = tiles < 8 ? tiles : 8; c >= 1; c--) {
    for (int groups = 1; groups <= j.n_blocks && groups <= 2 * threads; groups++) {
      const int tasks = ceil_div(tiles, c) * groups;
      const double cost = (double)ceil_div(tasks, threads) * c / groups * (1 + 0.02 * groups + 0.08 / c);
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
  const Loops *loops = call->dtype == FASTFILL_BF16 ? isa->bf16 : isa->f32;
  const Sizes &s = loops->sizes;
  const int element = call->dtype == FASTFILL_BF16 ? 2 : 4;
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
  j.gate = static_cast<const char *>(call->gate), j.gate_stride = call->gate_stride * element;
  j.up = static_cast<const char *>(call->up), j.up_stride = call->up_stride * element;
  j.down_t = static_cast<const char *>(call->down_t), j.down_stride = call->down_stride * element;
  j.init = static_cast<const char *>(call->init), j.init_stride = call->init_stride * element;
  j.out = static_cast<char *>(call->out), j.out_stride = call->out_stride * element;
  j.hidden = (int32_t)call->hidden, j.neurons = (int32_t)call->neurons, j.activation = call->activation;
  j.threads = threads;
  plan(j, s, threads);

  for (size_t begin = 0; begin < blocks.size();) {
    size_t end = begin, x_units = 0, h_units = 0;
    int64_t tokens = 0;
    for (; end < blocks.size() && (end == begin || tokens + blocks[end].tokens <= kMaxTokens); end++) {
      Block &b = blocks[end];
      b.x_at = x_units, b.h_at = h_units;
      x_units += (size_t)ceil_div(j.hidden, s.per_unit) * b.padded;
      h_units += (size_t)ceil_div(b.k, s.per_unit) * b.padded;
      tokens += b.tokens;
    }
    j.blocks = blocks.data() + begin, j.n_blocks = (int32_t)(end - begin);

    set_groups(j, j.n_chunks >= 4 * threads ? 1 : ceil_div(4 * threads, j.n_chunks));
    const int gate_groups = j.n_groups;
    const size_t gate_bytes = align64(loops->gate_up_bytes(j));
    plan_down(j, s, threads);
    const size_t down_bytes = align64(loops->down_bytes(j));
    const size_t per_thread = gate_bytes > down_bytes ? gate_bytes : down_bytes;
    Scratch scratch(align64(x_units * 4) + align64(h_units * 4) + per_thread * threads);
    if (!scratch.ok()) return FASTFILL_NO_MEMORY;
    j.xp = reinterpret_cast<uint32_t *>(scratch.data());
    j.h = reinterpret_cast<uint32_t *>(scratch.data() + align64(x_units * 4));
    char *rest = scratch.data() + align64(x_units * 4) + align64(h_units * 4);

    const int down_groups = j.n_groups;
    parallel(threads, j.n_blocks, rest, 0, &pass, [](void *p, int task, char *) {
      static_cast<Pass *>(p)->loops->pack_x(static_cast<Pass *>(p)->job, task);
    });
    j.n_groups = gate_groups;
    parallel(threads, j.n_chunks * gate_groups, rest, per_thread, &pass, [](void *p, int task, char *mine) {
      static_cast<Pass *>(p)->loops->gate_up(static_cast<Pass *>(p)->job, task, mine);
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

FASTFILL_API int32_t fastfill_sparse_ffn(fastfill_call *call) {
  try {
    return fastfill::run(call);
  } catch (const std::bad_alloc &) {
    return FASTFILL_NO_MEMORY;
  }
}
FASTFILL_API int32_t fastfill_isa_count() { return fastfill::kIsaCount; }
FASTFILL_API const char *fastfill_isa_name(int32_t i) { return fastfill::kIsas[i].name; }
FASTFILL_API int32_t fastfill_isa_supported(int32_t i) { return fastfill::kIsas[i].supported(); }
FASTFILL_API void fastfill_use_gomp(void *f) {
  fastfill::gomp_parallel.store(reinterpret_cast<fastfill::GompParallel>(f));
}
