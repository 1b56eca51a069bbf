#include "launch.h"

#include <cuda_runtime.h>

#include <mutex>

#include "bracket.cuh"
#include "squares.cuh"

// The host build in tests cannot parse <<<>>>.
#ifndef ROSE_LAUNCH
#define ROSE_LAUNCH(kernel, blocks, stream, arguments) \
  kernel<<<(unsigned)(blocks), kThreads, 0, (cudaStream_t)(stream)>>>(arguments)
#endif

namespace rose {
namespace cuda {
namespace {

const char* text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Blocks of a kernel that a device runs at once.
cudaError_t ask_resident(const void* kernel, int device, int64_t& resident) {
  int processors = 0, per_processor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0);
  }
  resident = (int64_t)processors * per_processor;
  return error;
}

// The same, asked once for each kernel and device: the answer takes longer than a launch.
cudaError_t resident_blocks(const void* kernel, int64_t& resident) {
  constexpr int kKept = 64;
  static std::mutex mutex;
  static struct {
    const void* kernel;
    int device;
    int64_t resident;
  } known[kKept];
  static int count = 0;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::lock_guard<std::mutex> lock(mutex);
  for (int i = 0; i < count; ++i) {
    if (known[i].kernel == kernel && known[i].device == device) {
      resident = known[i].resident;
      return error;
    }
  }
  error = ask_resident(kernel, device, resident);
#ifndef ROSE_SIMT  // where tests change it
  if (error == cudaSuccess && count < kKept) known[count++] = {kernel, device, resident};
#endif
  return error;
}

// As many blocks as run at once, or fewer where there are fewer tiles. Each has `share` tiles.
template <typename Kernel>
const char* grid_of(Kernel kernel, int64_t tiles, int64_t& blocks, int32_t& share) {
  int64_t resident = 0;
  const cudaError_t error = resident_blocks((const void*)kernel, resident);
  if (error != cudaSuccess) return text(error);
  share = tiles <= resident ? 1 : (int32_t)((tiles + resident - 1) / resident);
  blocks = tiles == 0 ? 1 : (tiles + share - 1) / share;
  return nullptr;
}

// `table`, and `others` like it, are parts of `arguments`.
template <typename Kernel, typename Arguments, typename... Tables>
const char* walk(Kernel kernel, Arguments& arguments, Stream stream, Table& table, Tables&... others) {
  int64_t blocks = 0;
  if (const char* failed = grid_of(kernel, table.tiles, blocks, table.share)) return failed;
  ((others.share = table.share), ...);
  ROSE_LAUNCH(kernel, blocks, stream, arguments);
  return text(cudaGetLastError());
}

// A few lines for each warp; at least one block, which clears the workspace.
int64_t blocks_of_sample(const SelectArguments& arguments) {
  constexpr int64_t kMostBlocks = 384, kLinesOfBlock = 16 * (kThreads / kWarp);
  const int64_t blocks = (arguments.strata.count + kLinesOfBlock - 1) / kLinesOfBlock;
  return blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks;
}

// The sample, which has to know how much of the log the warps of the pass after it may leave unused.
template <typename Kernel, typename Pass, typename Arguments>
const char* sample(Kernel kernel, Pass pass, Arguments& arguments, SelectArguments& select,
                   Stream stream) {
  int64_t blocks = 0;
  int32_t share = 0;
  if (const char* failed = grid_of(pass, select.risk.table.tiles, blocks, share)) return failed;
  select.log.spare = blocks * kThreads;  // a chunk has a place for each thread of a warp
  ROSE_LAUNCH(kernel, blocks_of_sample(select), stream, arguments);
  return text(cudaGetLastError());
}

// A pass, and the thresholds of what it has logged; or, of a sample, the thresholds and a pass by them.
template <typename Pass>
const char* search(SelectArguments& arguments, Stream stream, Pass pass) {
  Table& table = arguments.risk.table;
  const char* failed = nullptr;
  if (!arguments.approx) failed = pass();
  if (failed == nullptr && !arguments.approx) failed = walk(histogram_kernel, arguments, stream, table);
  if (failed == nullptr) failed = walk(narrow_kernel<false>, arguments, stream, table);
  if (failed == nullptr) failed = walk(narrow_kernel<true>, arguments, stream, table);
  if (failed == nullptr && arguments.approx) failed = pass();
  return failed;
}

// As many as arguments may be on every device: 4 KB.
struct Words {
  uint64_t* to;
  int32_t count;
  uint64_t words[508];
};

static __global__ void __launch_bounds__(kThreads) write_kernel(Words a) {
  const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
  if (i < a.count) a.to[i] = a.words[i];
}

}  // namespace

const char* select(SelectArguments arguments, Stream stream) {
  const char* failed = sample(sample_kernel, count_kernel, arguments, arguments, stream);
  if (failed != nullptr) return failed;
  return search(arguments, stream,
                [&] { return walk(count_kernel, arguments, stream, arguments.risk.table); });
}

const char* capture(CaptureArguments arguments, Stream stream) {
  return walk(capture_kernel, arguments, stream, arguments.risk.table);
}

const char* bracket_capture(SelectArguments arguments, Stream stream) {
  Table& table = arguments.risk.table;
  const char* failed = sample(sample_kernel, capture_pass_kernel, arguments, arguments, stream);
  if (failed != nullptr) return failed;
  failed =
      search(arguments, stream, [&] { return walk(capture_pass_kernel, arguments, stream, table); });
  if (failed != nullptr || arguments.approx) return failed;
  return walk(capture_finish_kernel, arguments, stream, table);
}

const char* bracket_update(StepArguments arguments, Stream stream) {
  Table& table = arguments.update.table;
  Table& ranked = arguments.select.risk.table;
  const bool fractional = arguments.update.fractional;
  const auto pass = fractional ? step_pass_kernel<true> : step_pass_kernel<false>;
  const auto finish = fractional ? step_finish_kernel<true> : step_finish_kernel<false>;
  const char* failed = sample(step_sample_kernel, pass, arguments, arguments.select, stream);
  if (failed != nullptr) return failed;
  failed =
      search(arguments.select, stream, [&] { return walk(pass, arguments, stream, table, ranked); });
  if (failed != nullptr || arguments.select.approx) return failed;
  return walk(finish, arguments, stream, table, ranked);
}

const char* update(UpdateArguments arguments, Stream stream) {
  const int64_t blocks = (arguments.table.count + kThreads - 1) / kThreads;
  ROSE_LAUNCH(prepare_kernel, blocks < 1 ? 1 : blocks, stream, arguments);
  if (const char* failed = text(cudaGetLastError())) return failed;
  const bool fractional = arguments.fractional;
  if (arguments.known != nullptr) {
    StepArguments step = {};
    step.update = arguments;
    return walk(fractional ? step_finish_kernel<true> : step_finish_kernel<false>, step, stream,
                step.update.table);
  }
  return walk(fractional ? update_kernel<true> : update_kernel<false>, arguments, stream,
              arguments.table);
}

const char* sums_of_squares(SquaresArguments arguments, Stream stream) {
  if (arguments.table.count == 0) return nullptr;
  if (const char* failed = walk(squares_kernel, arguments, stream, arguments.table)) return failed;
  constexpr int64_t kMostBlocks = 65535;
  const int64_t count = arguments.table.count;
  ROSE_LAUNCH(sums_kernel, count < kMostBlocks ? count : kMostBlocks, stream, arguments);
  return text(cudaGetLastError());
}

const char* is_capturing(Stream stream, bool& capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing((cudaStream_t)stream, &status);
  capturing = status != cudaStreamCaptureStatusNone;
  return text(error);
}

const char* write_words(uint64_t* to, const uint64_t* words, int64_t count, Stream stream) {
  Words part;
  constexpr int64_t kMost = sizeof(part.words) / sizeof(part.words[0]);
  for (int64_t from = 0; from < count; from += kMost) {
    part.to = to + from;
    part.count = (int32_t)(count - from < kMost ? count - from : kMost);
    for (int i = 0; i < part.count; ++i) part.words[i] = words[from + i];
    ROSE_LAUNCH(write_kernel, (part.count + kThreads - 1) / kThreads, stream, part);
    if (const char* failed = text(cudaGetLastError())) return failed;
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace rose
