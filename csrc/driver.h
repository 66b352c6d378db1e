// What every op's driver uses: the choice of the instruction set, threads, scratch memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "job.h"

namespace fastfill {

// The instruction set of that name, or the best one if it is null or empty; null if this processor lacks it.
const Isa *find_isa(const char *name);

// Runs body(context, task, scratch) for every task below `tasks`; each thread has its own `scratch_bytes` of scratch.
// Tasks are handed out as threads become free. Which thread does which task changes no result.
void parallel(int threads, int tasks, char *scratch, size_t scratch_bytes, void *context,
              void (*body)(void *context, int task, char *scratch));

inline size_t align64(size_t n) { return (n + 63) / 64 * 64; }
inline int ceil_div(int64_t a, int64_t b) { return (int)((a + b - 1) / b); }
inline int at_least_one(int n) { return n < 1 ? 1 : n; }

// Memory that is kept between calls, because fresh pages cost about 0.25 us each: 5 % of a 576 x 1536 layer at 1,024
// tokens.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch &) = delete;
  char *data() const { return static_cast<char *>(mine_.data); }
  bool ok() const { return mine_.data != nullptr; }

  struct Buffer {
    void *data = nullptr;
    size_t bytes = 0;
  };

 private:
  Buffer mine_;
};

size_t scratch_bytes();  // of all threads, in use or kept
void release_scratch();  // gives back what no call is using

}  // namespace fastfill
