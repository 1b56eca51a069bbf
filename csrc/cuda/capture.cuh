// Capturing masks by thresholds that are known.
#pragma once

#include "select.cuh"

namespace rose {
namespace cuda {

ROSE_DEVICE Bounds read_bounds(const int64_t* record) {
  return {(int32_t)record[0], (int32_t)record[1]};
}

// Writes the bits of masks.
struct Bits {
  ROSE_METHOD void operator()(const Segment& segment, int64_t i, unsigned selected, int count) const {
    uint8_t* const bits = segment.bits;
    if (count == 16) {
      write<uint8_t>(bits, i / 8, (uint8_t)selected);
      write<uint8_t>(bits, i / 8 + 1, (uint8_t)(selected >> 8));
    } else if (count == 8) {
      write<uint8_t>(bits, i / 8, (uint8_t)selected);
    } else if (count == 4) {  // two lanes have a byte between them
      const unsigned next = __shfl_down_sync(kFullWarp, selected, 1);
      if (lane() % 2 == 0) write<uint8_t>(bits, i / 8, (uint8_t)(selected | next << 4));
    } else {  // as many lanes as there are elements have one each
      const unsigned word = __ballot_sync(kFullWarp, selected != 0);
      const unsigned there = __ballot_sync(kFullWarp, count != 0);
      if (lane() % 8 == 0 && (there >> lane() & 1u) != 0) {
        write<uint8_t>(bits, i / 8, (uint8_t)(word >> lane()));
      }
    }
  }
};

// The record of the ranking that is used, or an empty one. One thread.
ROSE_DEVICE void copy_record(const int64_t* from, int64_t* to) {
  if (from == to) return;
  for (int i = 0; i < kFields; ++i) to[i] = from != nullptr ? from[i] : i < 2 ? -1 : 0;
}

static __global__ void __launch_bounds__(kThreads, 4) capture_kernel(CaptureArguments a) {
  if (blockIdx.x == 0 && threadIdx.x == 0) copy_record(a.known, a.record);
  NoNotes notes = {read_bounds(a.known), nullptr};
  settle(a.risk, notes, Bits());
}

}  // namespace cuda
}  // namespace rose
