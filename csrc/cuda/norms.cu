// Launchers of norms.cuh.
#include <cuda_runtime.h>

#include "launch.h"
#include "norms.cuh"

#ifndef ROSE_LAUNCH
#define ROSE_LAUNCH(kernel, blocks, stream, arguments) \
  kernel<<<(unsigned)(blocks), kThreads, 0, (cudaStream_t)(stream)>>>(arguments)
#endif

namespace rose {
namespace cuda {
namespace {

const char* latest_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* clip_factors(ClipArguments arguments, Stream stream) {
  ROSE_LAUNCH(clip_kernel, 1, stream, arguments);
  return latest_error();
}

const char* select_tensors(TensorsArguments arguments, Stream stream) {
  ROSE_LAUNCH(tensors_kernel, 1, stream, arguments);
  return latest_error();
}

}  // namespace cuda
}  // namespace rose
