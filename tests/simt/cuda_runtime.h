// CUDA kernels on the CPU, in place of CUDA's header of this name: a fiber for each CUDA thread of a
// block, switched at barriers and warp operations only, in an order that tests choose. A race, a
// barrier that not all threads reach or a warp operation with lanes missing changes results with the
// order, or is reported. Accesses through read() and write() are counted and checked for alignment.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline  // which compiles in a quarter of the time
#define __launch_bounds__(...)
#if defined(__SANITIZE_ADDRESS__)  // which does not guard thread_local variables: see launch()
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace simt {

constexpr int kWarp = 32;

enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int os_threads = 1;      // that run blocks side by side
  int resident = 3;        // blocks of a grid that walks tiles
  bool no_stream = false;  // as in a PyTorch built without CUDA
};
extern Settings settings;
extern int guards;  // of the current device that are alive

// Launches that were captured, and the memory that was allocated meanwhile.
struct Graph {
  std::vector<std::function<void()>> launches;
  std::vector<std::shared_ptr<void>> memory;
};
extern Graph* capturing;  // or null

template <typename T>
void own_in_graph(const T& memory) {
  if (capturing != nullptr) capturing->memory.push_back(std::make_shared<T>(memory));
}

struct Counters {
  int64_t launches = 0, bytes_read = 0, bytes_written = 0, uploads = 0;
};
Counters take_counters();  // since the last call

struct Thread {
  dim3 thread, block, blocks;
};
// The one that runs. (Neither a call nor a constructor to see to, as thread_local has in a library.)
extern __thread const Thread* running;
inline const Thread& self() { return *running; }

void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel);
void count_upload();
const char* take_error();  // of launches since the last call, or null

void barrier();
// All lanes of `mask` come here with a value each.
struct Exchanged {
  uint64_t values[kWarp];
  unsigned odd;  // lanes whose values are
};
const Exchanged& exchange(unsigned mask, uint64_t value);
void check_access(const void* pointer, size_t bytes, bool writes);

template <typename T>
uint64_t to_word(T x) {
  static_assert(sizeof(T) <= 8, "a warp exchanges words of 64 bits");
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof(T));
  return word;
}

template <typename T>
T shuffle(unsigned mask, T x, int from) {
  T result;
  std::memcpy(&result, &exchange(mask, to_word(x)).values[from], sizeof(T));
  return result;
}

inline int lane() { return static_cast<int>(self().thread.x % kWarp); }

}  // namespace simt

#define threadIdx (simt::self().thread)
#define blockIdx (simt::self().block)
#define gridDim (simt::self().blocks)

inline void __syncthreads() { simt::barrier(); }
inline void __threadfence() {}  // atomics order what is around them

template <typename T>
T __shfl_sync(unsigned mask, T x, int from) {
  return simt::shuffle(mask, x, from % simt::kWarp);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int delta) {
  const int from = simt::lane() - delta;
  return simt::shuffle(mask, x, from < 0 ? simt::lane() : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, int delta) {
  const int from = simt::lane() + delta;
  return simt::shuffle(mask, x, from >= simt::kWarp ? simt::lane() : from);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return simt::exchange(mask, predicate).odd;
}
inline void __syncwarp() { simt::exchange(0xFFFFFFFFu, 0); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* at, T x) {
  return __atomic_fetch_add(at, x, __ATOMIC_ACQ_REL);
}
template <typename T>
T __ldcg(const T* at) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}

#define ROSE_GLOBAL_READ(pointer, bytes) simt::check_access(pointer, bytes, false)
#define ROSE_GLOBAL_WRITE(pointer, bytes) simt::check_access(pointer, bytes, true)
#define ROSE_LAUNCH(kernel, blocks, stream, arguments) \
  simt::launch(static_cast<unsigned>(blocks), kThreads, [=] { kernel(arguments); })

// What launchers call of the runtime.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

namespace simt {
inline std::string last_error;
}
inline const char* cudaGetErrorString(cudaError_t) { return simt::last_error.c_str(); }
inline cudaError_t cudaGetLastError() {
  const char* error = simt::take_error();
  if (error == nullptr) return cudaSuccess;
  simt::last_error = error;
  return cudaErrorUnknown;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::settings.resident;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = simt::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
