#include "tiles.h"

namespace rose {
namespace cpu {
namespace {

// fn(offset of the run's first element, stride within the run, its position, its length) for each run
// of the innermost dimension inside [start, start + n).
template <typename Fn>
void for_each_run(const Segment& segment, const Operand& operand, int64_t start, int n, Fn fn) {
  if (operand.linear) return fn(start, int64_t{1}, 0, n);
  const size_t inner = segment.sizes.size() - 1;
  for (int done = 0; done < n;) {
    int64_t rest = start + done, offset = 0;
    int64_t column = 0;
    for (size_t d = inner + 1; d-- > 0;) {
      const int64_t coordinate = rest % segment.sizes[d];
      rest /= segment.sizes[d];
      offset += coordinate * operand.strides[d];
      if (d == inner) column = coordinate;
    }
    const int run = static_cast<int>(std::min<int64_t>(n - done, segment.sizes[inner] - column));
    fn(offset, operand.strides[inner], done, run);
    done += run;
  }
}

}  // namespace

float* load(const Segment& segment, const Operand& operand, int64_t start, int n, float* buffer) {
  if (operand.contiguous_floats()) return reinterpret_cast<float*>(operand.data) + start;
  for_each_run(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int run) {
    tile_kernels().widen(operand.data + offset * operand.element_size(), operand.dtype, stride, run,
                         buffer + at);
  });
  return buffer;
}

void store(const Segment& segment, const Operand& operand, int64_t start, int n, const float* values) {
  if (operand.contiguous_floats()) return;
  for_each_run(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int run) {
    tile_kernels().narrow(values + at, operand.dtype, stride, run,
                          operand.data + offset * operand.element_size());
  });
}

void store_stochastic(const Segment& segment, const Operand& operand, int64_t start, int n,
                      const float* values, uint32_t key, int64_t index, Rounded what) {
  for_each_run(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int run) {
    for (int done = 0; done < run;) {
      const uint64_t first = static_cast<uint64_t>(index + at + done);
      const uint64_t until_carry = (uint64_t{1} << 32) - (first & 0xFFFFFFFFu);
      const int part = static_cast<int>(std::min<uint64_t>(run - done, until_carry));
      tile_kernels().narrow_stochastic(values + at + done, stride, part,
                                       operand.data + (offset + done * stride) * operand.element_size(),
                                       key, first, what);
      done += part;
    }
  });
}

}  // namespace cpu
}  // namespace rose
