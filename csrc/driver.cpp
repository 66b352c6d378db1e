// The choice of the instruction set, threads, scratch memory.
#include "driver.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(FASTFILL_X86)
#include <cpuid.h>
#endif
#if !defined(_WIN32)
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "fastfill.h"

namespace fastfill {

// ---- instruction sets ---------------------------------------------------------------------------------------------

namespace {

#if defined(FASTFILL_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx_vnni() {  // gcc 12 has no name for it: CPUID leaf 7.1, EAX bit 4
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#if defined(__linux__)
// CPUID leaf 7, EDX: bits 22 (BF16), 24 (tiles) and 25 (INT8), which gcc 10 has no names for. The system keeps tiles only for
// those who ask, as torch's oneDNN does too: no for a process that has threads with small signal stacks.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
  static const bool has = has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted &&
                          syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return has;
}
#else
bool has_amx() { return false; }
#endif
#endif
bool always() { return true; }

const Isa kIsas[] = {  // best first
#if defined(FASTFILL_X86)
    {"amx", has_amx, &avx512_f32, &amx_bf16, &amx_int8_f32, &amx_int8_bf16,
     &avx512_vnni_product, avx512_top_k, avx512_packed},
    {"avx512_bf16", has_avx512_bf16, &avx512_f32, &avx512_bf16_bf16, &avx512_vnni_int8_f32, &avx512_vnni_int8_bf16,
     &avx512_vnni_product, avx512_top_k, avx512_packed},
    {"avx512_vnni", has_avx512_vnni, &avx512_f32, &avx512_bf16_via_f32, &avx512_vnni_int8_f32, &avx512_vnni_int8_bf16,
     &avx512_vnni_product, avx512_top_k, avx512_packed},
    {"avx512", has_avx512, &avx512_f32, &avx512_bf16_via_f32, &avx2_int8_f32, &avx2_int8_bf16,
     &avx2_product, avx512_top_k, avx512_packed},
    {"avx_vnni", has_avx_vnni, &avx2_f32, &avx2_bf16_via_f32, &avx_vnni_int8_f32, &avx_vnni_int8_bf16,
     &avx_vnni_product, avx2_top_k, avx2_packed},
    {"avx2", has_avx2, &avx2_f32, &avx2_bf16_via_f32, &avx2_int8_f32, &avx2_int8_bf16,
     &avx2_product, avx2_top_k, avx2_packed},
#endif
    {"portable", always, &portable_f32, &portable_bf16_via_f32, &portable_int8_f32, &portable_int8_bf16,
     &portable_product, portable_top_k, portable_packed},
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

}  // namespace

const Isa *find_isa(const char *name) {
  for (const Isa &isa : kIsas)
    if ((!name || !*name || !strcmp(name, isa.name)) && isa.supported()) return &isa;
  return nullptr;
}

// ---- threads ------------------------------------------------------------------------------------------------------

namespace {

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

}  // namespace

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

namespace {

constexpr size_t kHuge = 2 << 20;

// Huge pages where the system grants them on request.
void *allocate(size_t bytes) {
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

void free_memory(void *p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

// As many as calls have run at once; never destroyed, because threads may still call while the process ends.
std::mutex &free_mutex = *new std::mutex;
std::vector<Scratch::Buffer> &free_buffers = *new std::vector<Scratch::Buffer>;
std::atomic<size_t> held{0};  // bytes of all buffers, those in use included

}  // namespace

size_t scratch_bytes() { return held.load(); }

void release_scratch() {
  std::vector<Scratch::Buffer> unused;
  {
    std::lock_guard<std::mutex> lock(free_mutex);
    unused.swap(free_buffers);
  }
  for (const Scratch::Buffer &buffer : unused) {
    free_memory(buffer.data);
    held -= buffer.bytes;
  }
}

Scratch::Scratch(size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(free_mutex);
    size_t at = 0;
    for (size_t i = 0; i < free_buffers.size(); i++)
      if (!mine_.data || free_buffers[i].bytes > mine_.bytes) mine_ = free_buffers[i], at = i;
    if (mine_.data) free_buffers.erase(free_buffers.begin() + at);
  }
  if (mine_.bytes >= bytes) return;
  free_memory(mine_.data);
  held -= mine_.bytes;
  const size_t rounded = (bytes + bytes / 8 + kHuge - 1) / kHuge * kHuge;
  mine_ = {allocate(rounded), rounded};
  if (!mine_.data) mine_.bytes = 0;
  held += mine_.bytes;
}

Scratch::~Scratch() {
  if (!mine_.data) return;
  std::lock_guard<std::mutex> lock(free_mutex);
  free_buffers.push_back(mine_);
}

}  // namespace fastfill

FASTFILL_API int32_t fastfill_isa_count() { return fastfill::kIsaCount; }
FASTFILL_API const char *fastfill_isa_name(int32_t i) { return fastfill::kIsas[i].name; }
FASTFILL_API int32_t fastfill_isa_supported(int32_t i) { return fastfill::kIsas[i].supported(); }
FASTFILL_API int64_t fastfill_scratch_bytes() { return (int64_t)fastfill::scratch_bytes(); }
FASTFILL_API void fastfill_release() { fastfill::release_scratch(); }
FASTFILL_API void fastfill_use_gomp(void *f) {
  fastfill::gomp_parallel.store(reinterpret_cast<fastfill::GompParallel>(f));
}
