// What csrc/cpu/runs.h promises of FpMode, for tests/test_arm.py: whatever the mode of the calling
// thread, denormals are kept while it lives, and the mode is as it was afterwards.
#include <cstdio>

#include "runs.h"

namespace {

#if defined(__x86_64__)
uint64_t mode() { return _mm_getcsr() & ~0x3Fu; }  // but for flags of what has happened
void set_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
constexpr uint64_t kFlushed = 0x9FC0,
                   kDownward = 0x3F80;  // flush to zero, denormals are zeros; rounding
#elif defined(__aarch64__)
uint64_t mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
constexpr uint64_t kFlushed = 1 << 24, kDownward = 2 << 22;
#endif

// From memory and to it, so that neither is computed elsewhere.
volatile float smallest = 0x1p-126f, half = 0.5f, one = 1.0f, tiny = 0x1p-30f, result;

bool keeps_denormals() {
  result = smallest * half;
  return result != 0;
}
bool rounds_to_nearest() {
  result = one - tiny;
  return result == 1;
}

}  // namespace

int main() {
  bool right = keeps_denormals() && rounds_to_nearest();
  const uint64_t before = mode();
  for (const uint64_t other : {before, kFlushed, kDownward, kFlushed | kDownward}) {
    set_mode(other);
    const bool nearest = rounds_to_nearest(), kept = keeps_denormals();
    right = right && kept == ((other & kFlushed & ~before) == 0) &&
            nearest == !(other & kDownward & ~before);
    {
      rose::cpu::FpMode fp_mode;
      right = right && keeps_denormals() && rounds_to_nearest();
    }
    right = right && mode() == other;
  }
  set_mode(before);
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}
