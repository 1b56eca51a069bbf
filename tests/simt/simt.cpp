// See cuda_runtime.h.
#include "cuda_runtime.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(ROSE_TSAN)  // this file is not instrumented itself: what it does is no race of a kernel
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

Settings settings;
int guards = 0;
Graph* capturing = nullptr;
__thread const Thread* running = nullptr;

namespace {

std::atomic<int64_t> launches, bytes_read, bytes_written, uploads;
std::mutex error_mutex;
std::string error_text;
bool failed = false;

void fail(const std::string& text) {
  std::lock_guard<std::mutex> lock(error_mutex);
  if (!failed) error_text = text;
  failed = true;
}

// ------------------------------------------------------------------------------------ context switch

#if defined(__x86_64__)
// Saves what a callee must keep on the stack that is left, and takes it from the one that is entered.
extern "C" void rose_simt_switch(void** from, void* to);
asm(R"(
.text
.type rose_simt_switch,@function
rose_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rose_simt_switch,.-rose_simt_switch
)");
struct Place {
  void* stack_pointer = nullptr;
};
#else
struct Place {
  ucontext_t context;
};
#endif

// No power of two: the ends of all stacks would want the same few lines of a cache.
constexpr size_t kStack = (64 << 10) + 17 * 64;

enum class State : uint8_t { kReady, kAtBarrier, kInExchange, kDone };

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack;
  Thread thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(ROSE_TSAN)
  void* tsan = nullptr;
#endif
};

struct Warp {
  unsigned mask = 0, arrived = 0;
  bool second = false;
  Exchanged exchanged[2];  // in turn: one may be read while the next comes about
};

// What one OS thread runs: a block at a time.
struct Worker {
  std::vector<Fiber> fibers;
  std::vector<State> states;  // of the fibers
  std::vector<Warp> warps;
  Place scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  unsigned at_barrier = 0, alive = 0;
  bool abandoned = false;
  int64_t read = 0, written = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  void* scheduler_fake = nullptr;
#endif
#if defined(ROSE_TSAN)
  void* tsan = nullptr;
#endif

  void run_block(unsigned block, unsigned blocks, unsigned threads, std::mt19937_64& random);
  State& state() { return states[current->thread.thread.x]; }
  void enter(Fiber& fiber);
  void leave(bool for_ever = false);
};

thread_local Worker worker;
__thread Worker* here;  // the same, at once

void main_of_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &worker.scheduler_stack, &worker.scheduler_size);
#endif
#if defined(ROSE_TSAN)
  __tsan_acquire(worker.current);
#endif
  (*worker.kernel)();
#if defined(ROSE_TSAN)
  __tsan_release(&worker);
#endif
  worker.state() = State::kDone;
  --worker.alive;
  worker.leave(true);
}

void Worker::enter(Fiber& fiber) {
  current = &fiber;
  running = &fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack.get(), kStack);
#endif
#if defined(ROSE_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  rose_simt_switch(&scheduler.stack_pointer, fiber.place.stack_pointer);
#else
  swapcontext(&scheduler.context, &fiber.place.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

// To the next thread of the round that can run, at once where the order says which it is and no
// sanitizer must be told, or else back to run_block.
void Worker::leave(bool for_ever) {
  Fiber& fiber = *current;
  (void)for_ever;
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(ROSE_TSAN)
  if (settings.order == Order::kForward && !abandoned) {
    const auto next =
        std::find(states.begin() + fiber.thread.thread.x + 1, states.end(), State::kReady);
    if (next != states.end()) {
      current = &fibers[next - states.begin()];
      running = &current->thread;
      rose_simt_switch(&fiber.place.stack_pointer, current->place.stack_pointer);
      return;
    }
  }
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_size);
#endif
#if defined(ROSE_TSAN)
  __tsan_switch_to_fiber(tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  rose_simt_switch(&fiber.place.stack_pointer, scheduler.stack_pointer);
#else
  swapcontext(&fiber.place.context, &scheduler.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack.get(), kStack);  // the last frames there did not return
#endif
#if defined(__x86_64__)
  // As if main_of_fiber had been called: six registers and a return address, then a null one.
  auto* top =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~15ull);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&main_of_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.place.stack_pointer = top;
#else
  getcontext(&fiber.place.context);
  fiber.place.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.place.context.uc_stack.ss_size = kStack;
  fiber.place.context.uc_link = nullptr;
  makecontext(&fiber.place.context, main_of_fiber, 0);
#endif
}

void Worker::run_block(unsigned block, unsigned blocks, unsigned threads, std::mt19937_64& random) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  states.assign(kWarp * warps.size(), State::kDone);
  std::fill_n(states.begin(), threads, State::kReady);
  at_barrier = 0;
  alive = threads;
  abandoned = false;
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Order::kReverse) std::reverse(order.begin(), order.end());
#if defined(ROSE_TSAN)
  tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].thread = {{i, 0, 0}, {block, 0, 0}, {blocks, 1, 1}};
    start(fibers[i]);
#if defined(ROSE_TSAN)
    fibers[i].tsan = __tsan_create_fiber(0);
    __tsan_release(&fibers[i]);  // what came before the block happened before its threads
#endif
  }
  while (alive > 0 && !abandoned) {
    if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (unsigned i : order) {
      if (states[i] != State::kReady || abandoned) continue;
      enter(fibers[i]);
      moved = true;
    }
    if (!moved && !abandoned) {
      fail(
          "threads of a block wait for ever: a barrier or a warp operation that not all of them reach");
      abandoned = true;
    }
  }
#if defined(ROSE_TSAN)
  __tsan_acquire(this);
  for (unsigned i = 0; i < threads; ++i) __tsan_destroy_fiber(fibers[i].tsan);
#endif
  bytes_read += read;
  bytes_written += written;
  read = written = 0;
}

}  // namespace

void barrier() {
  Worker& w = *here;
#if defined(ROSE_TSAN)
  __tsan_release(&w.at_barrier);
#endif
  if (++w.at_barrier == w.fibers.size()) {
    w.at_barrier = 0;
    std::replace(w.states.begin(), w.states.end(), State::kAtBarrier, State::kReady);
  } else {
    w.state() = State::kAtBarrier;
    w.leave();
  }
#if defined(ROSE_TSAN)
  __tsan_acquire(&w.at_barrier);
#endif
}

const Exchanged& exchange(unsigned mask, uint64_t value) {
  Worker& w = *here;
  const unsigned thread = w.current->thread.thread.x;
  Warp& warp = w.warps[thread / kWarp];
  const unsigned bit = 1u << (thread % kWarp);
  if ((mask & bit) == 0 || (warp.arrived != 0 && warp.mask != mask)) {
    fail("a warp operation with a mask that lacks its own lane, or differs between lanes");
    w.abandoned = true;
    w.leave(true);
  }
#if defined(ROSE_TSAN)
  __tsan_release(&warp);
#endif
  Exchanged& exchanged = warp.exchanged[warp.second];
  if (warp.arrived == 0) exchanged.odd = 0;
  warp.mask = mask;
  exchanged.values[thread % kWarp] = value;
  exchanged.odd |= value % 2 != 0 ? bit : 0;
  warp.arrived |= bit;
  if (warp.arrived == mask) {
    // The next one cannot end before all lanes have left this one and come again.
    warp.second = !warp.second;
    warp.arrived = 0;
#if defined(ROSE_TSAN)
    __tsan_release(&warp);
#endif
    const auto first = w.states.begin() + thread / kWarp * kWarp;
    std::replace(first, first + kWarp, State::kInExchange, State::kReady);
  } else {
    w.state() = State::kInExchange;
    w.leave();
  }
#if defined(ROSE_TSAN)
  __tsan_acquire(&warp);
#endif
  return exchanged;
}

void check_access(const void* pointer, size_t bytes, bool writes) {
  Worker& w = *here;
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("an access of " + std::to_string(bytes) + " bytes at an address that is not a multiple");
    w.abandoned = true;
    w.leave(true);
  }
  (writes ? w.written : w.read) += static_cast<int64_t>(bytes);
}

void count_upload() { ++uploads; }

void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  if (capturing != nullptr) {
    capturing->launches.push_back([=] { launch(blocks, threads, kernel); });
    return;
  }
  ++launches;
  std::mt19937_64 random(settings.seed + static_cast<uint64_t>(launches));
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
  std::atomic<unsigned> next{0};
  const auto work = [&](uint64_t seed) {
    std::mt19937_64 own(seed);
    here = &worker;
    worker.kernel = &kernel;
#if defined(__x86_64__)
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x1F80);  // a device does not share the calling thread's floating-point mode
#endif
    for (unsigned i; (i = next++) < blocks;) worker.run_block(order[i], blocks, threads, own);
#if defined(__x86_64__)
    _mm_setcsr(mode);
#endif
  };
  std::vector<std::thread> others;
#if !defined(__SANITIZE_ADDRESS__)  // where blocks side by side would share their shared memory
  for (int i = 1; i < settings.os_threads; ++i) others.emplace_back(work, random());
#endif
  work(random());
  for (std::thread& other : others) other.join();
}

Counters take_counters() {
  return {launches.exchange(0), bytes_read.exchange(0), bytes_written.exchange(0), uploads.exchange(0)};
}

const char* take_error() {
  static std::string taken;
  std::lock_guard<std::mutex> lock(error_mutex);
  if (!failed) return nullptr;
  failed = false;
  taken = error_text;
  return taken.c_str();
}

}  // namespace simt
