// Sums of squares of tensors.
#pragma once

#include "access.cuh"

namespace rose {
namespace cuda {

// Sums of squares of the tiles. A thread has the same elements whatever the layout, and sums have a
// fixed order, so the sum of a tensor does not depend on where it lies.
static __global__ void __launch_bounds__(kThreads) squares_kernel(SquaresArguments a) {
  __shared__ double scratch[kThreads / kWarp];
  const float inv_scale = scalar_or_one(a.inv_scale);
  for_each_run(a.table, [&](const Run& run) ROSE_ALWAYS_INLINE {
    const Segment& segment = a.table.segments[run.segment];
    const int64_t begin = run.begin;
    const int count = run.count;
    const Dtype dtype = segment.dtype[0];
    const bool is_vector = segment.access != Access::kSingle;
    const char* const data = data_from(segment, 0, dtype, begin);
#pragma unroll 1
    for (int start = 0; start < count; start += kTile) {
      const int stop = count < start + kTile ? count : start + kTile;
      double sum = 0.0;
      const auto add_square = [&](float x) {
        x = mul(x, inv_scale);
        sum += (double)x * (double)x;  // the product is exact
      };
      for (int i = start + threadIdx.x * 4; i < stop; i += kThreads * 4) {
        if (is_vector && i + 4 <= stop) {
          const auto raw = read_vector<4>(data, dtype, i);
#pragma unroll
          for (int j = 0; j < 4; ++j) add_square(get(raw, dtype, j));
        } else {
#pragma unroll 1
          for (int j = i; j < i + 4 && j < stop; ++j) {
            int64_t place[1];
            locate(a.table.dims, segment, begin + j, place);
            add_square(read_element(segment.data[0], dtype, place[0]));
          }
        }
      }
      sum = block_sum(sum, scratch);
      if (threadIdx.x == 0) a.partial[segment.first_tile + (begin + start) / kTile] = sum;
    }
  });
}

// The sum of each segment from its tiles. One block for a segment.
static __global__ void __launch_bounds__(kThreads) sums_kernel(SquaresArguments a) {
  __shared__ double scratch[kThreads / kWarp];
  for (int index = (int)blockIdx.x; index < a.table.count; index += (int)gridDim.x) {
    const Segment& segment = a.table.segments[index];
    const int64_t tiles = (segment.n + kTile - 1) / kTile;
    double sum = 0.0;
    for (int64_t t = threadIdx.x; t < tiles; t += kThreads) sum += a.partial[segment.first_tile + t];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) a.sums[index] = sum;
  }
}

}  // namespace cuda
}  // namespace rose
