// What is made of the norms of tensors. There are few of them: one block does it.
#pragma once

#include "access.cuh"
#include "rose/norms.h"

namespace rose {
namespace cuda {

static __global__ void __launch_bounds__(kThreads) clip_kernel(ClipArguments a) {
  __shared__ double scratch[kThreads / kWarp];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) sum += a.sums[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) write_clip_factors(sum, a.max_norm, a.factors);
}

static __global__ void __launch_bounds__(kThreads) tensors_kernel(TensorsArguments a) {
  __shared__ Count scratch[kThreads / kWarp];
  __shared__ Count total;
  // A thread has the same keys throughout.
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) {
    float norm = norm_of(a.sums[i]);
    if (a.clip != nullptr) norm = mul(norm, a.clip[0]);
    a.keys[i] = a.exp_avg_sums == nullptr
                    ? first_order_key(norm, a.rank_inactive)
                    : second_order_key(norm, norm_of(a.exp_avg_sums[i]), a.alphas[i], a.rank_inactive);
  }
  // The sum over all keys, for all threads.
  const auto sum_of = [&](auto part) {
    Count sum = 0;
    for (int64_t i = threadIdx.x; i < a.count; i += kThreads) sum += part(a.keys[i]);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) total = sum;
    __syncthreads();
    return total;  // written again after block_sum's barriers
  };
  const Count ranked = sum_of([](uint32_t key) { return Count(key < kInactiveKey); });
  const Count inactive = sum_of([](uint32_t key) { return Count(key == kInactiveKey); });

  const auto threshold = [&](int64_t fraction) {
    const Quantile quantile = quantile_of(fraction, (int64_t)ranked);
    // Bit by bit, the largest number that so many keys at most are less than. Two counts in a word.
    uint32_t low = 0, high = 0;
#pragma unroll 1
    for (int bit = kKeyBits - 1; bit >= 0; --bit) {
      const uint32_t low_try = low | 1u << bit, high_try = high | 1u << bit;
      const Count less =
          sum_of([=](uint32_t key) { return Count(key < low_try) | Count(key < high_try) << 32; });
      if ((int64_t)(less & 0xFFFFFFFFu) <= quantile.index) low = low_try;
      if ((int64_t)(less >> 32) <= quantile.next) high = high_try;
    }
    return (int32_t)between(low, high, quantile.weight);
  };
  Bounds bounds = {-1, -1};
  if (ranked > 0) bounds = {threshold(a.upper), threshold(a.lower) - 1};

  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) {
    a.mask[i] = if_selected(a.keys[i], bounds, 1) != 0;
  }
  const Count kept = sum_of(
      [=](uint32_t key) { return Count(key < kInactiveKey && if_selected(key, bounds, 1) != 0); });
  if (threadIdx.x != 0) return;
  const int64_t record[8] = {bounds.high,
                             bounds.low,
                             (int64_t)kept,
                             (int64_t)ranked,
                             (int64_t)inactive,
                             a.count - (int64_t)(ranked + inactive),
                             0,
                             0};
#pragma unroll
  for (int k = 0; k < 8; ++k) a.record[k] = record[k];
}

}  // namespace cuda
}  // namespace rose
