#include <stdlib.h>
#include <string.h>

#include "loops.h"

namespace rose {
namespace cpu {

extern const Loops loops_default;

#if defined(__x86_64__)
extern const Loops loops_avx2;
extern const Loops loops_avx512;

static const Loops& choose() {
  const char* cap = getenv("ATEN_CPU_CAPABILITY");
  const bool only_default = cap && strcmp(cap, "default") == 0;
  const bool at_most_avx2 = cap && strcmp(cap, "avx2") == 0;
  __builtin_cpu_init();
  if (!only_default && !at_most_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    return loops_avx512;
  }
  if (!only_default && __builtin_cpu_supports("avx2")) return loops_avx2;
  return loops_default;
}
#else
static const Loops& choose() { return loops_default; }
#endif

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

}  // namespace cpu
}  // namespace rose
