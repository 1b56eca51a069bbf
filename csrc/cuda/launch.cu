#include "launch.h"

#include <cuda_runtime.h>

#include "select.cuh"
#include "update.cuh"

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

// Launches as many blocks as run at once, or fewer where there are fewer tiles; `table` is a part of
// `arguments`.
template <typename Kernel, typename Arguments>
const char* walk(Kernel kernel, Arguments& arguments, Table& table, Stream stream) {
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0);
  }
  if (error != cudaSuccess) return text(error);
  const int64_t resident = (int64_t)processors * per_processor;
  table.share = table.tiles <= resident ? 1 : (int32_t)((table.tiles + resident - 1) / resident);
  const int64_t blocks = table.tiles == 0 ? 1 : (table.tiles + table.share - 1) / table.share;
  ROSE_LAUNCH(kernel, blocks, stream, arguments);
  return text(cudaGetLastError());
}

}  // namespace

const char* select(SelectArguments arguments, Stream stream) {
  // A few lines for each warp; at least one block, which clears the workspace.
  constexpr int64_t kMostBlocks = 256, kLinesOfBlock = 8 * (kThreads / kWarp);
  const int64_t blocks = (arguments.lines + kLinesOfBlock - 1) / kLinesOfBlock;
  ROSE_LAUNCH(sample_kernel,
              blocks < 1             ? 1
              : blocks < kMostBlocks ? blocks
                                     : kMostBlocks,
              stream, arguments);
  const char* failed = text(cudaGetLastError());
  Table& table = arguments.risk.table;
  if (failed == nullptr) failed = walk(count_kernel, arguments, table, stream);
  if (failed == nullptr && !arguments.approx) {
    failed = walk(narrow_kernel<false>, arguments, table, stream);
    if (failed == nullptr) failed = walk(narrow_kernel<true>, arguments, table, stream);
  }
  return failed;
}

const char* capture(CaptureArguments arguments, Stream stream) {
  return walk(capture_kernel, arguments, arguments.risk.table, stream);
}

const char* update(UpdateArguments arguments, Stream stream) {
  const int64_t blocks = (arguments.table.count + kThreads - 1) / kThreads;
  ROSE_LAUNCH(prepare_kernel, blocks < 1 ? 1 : blocks, stream, arguments);
  if (const char* failed = text(cudaGetLastError())) return failed;
  return arguments.fractional ? walk(update_kernel<true>, arguments, arguments.table, stream)
                              : walk(update_kernel<false>, arguments, arguments.table, stream);
}

const char* sums_of_squares(SquaresArguments arguments, Stream stream) {
  if (arguments.table.count == 0) return nullptr;
  if (const char* failed = walk(squares_kernel, arguments, arguments.table, stream)) return failed;
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

}  // namespace cuda
}  // namespace rose
