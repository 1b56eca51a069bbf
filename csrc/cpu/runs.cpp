#include "runs.h"

#include <cstring>

namespace rose {
namespace cpu {
namespace {

// fn(offset of the first element, stride, its position, elements) for each part of the innermost
// dimension inside [start, start + n).
template <typename Fn>
void for_each_row(const Segment& segment, const Operand& operand, int64_t start, int n, Fn fn) {
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
    const int row = static_cast<int>(std::min<int64_t>(n - done, segment.sizes[inner] - column));
    fn(offset, operand.strides[inner], done, row);
    done += row;
  }
}

// fn(type of equal size) for elements of either size.
template <typename Fn>
void with_item(const Operand& operand, Fn fn) {
  if (operand.element_size() == 4) {
    fn(uint32_t());
  } else {
    fn(uint16_t());
  }
}

}  // namespace

Run open_run(const Segment& segment, int64_t start, int n, Buffers& buffers) {
  Run run = {};
  run.n = n;
  run.factors[0] = run.factors[1] = 1;
  for (size_t k = 0; k < segment.operands.size(); ++k) {
    const Operand& operand = segment.operands[k];
    run.dtypes[k] = operand.dtype;
    if (operand.linear) {
      run.data[k] = operand.data + start * operand.element_size();
      continue;
    }
    run.data[k] = buffers.data[k];
    with_item(operand, [&](auto item) {
      typedef decltype(item) Item;
      const auto* from = reinterpret_cast<const Item*>(operand.data);
      auto* to = reinterpret_cast<Item*>(run.data[k]);
      for_each_row(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int count) {
        for (int i = 0; i < count; ++i) to[at + i] = from[offset + i * stride];
      });
    });
  }
  return run;
}

char* place_of(const Segment& segment, const Operand& operand, int64_t element) {
  if (!operand.linear) {
    for_each_row(segment, operand, element, 1,
                 [&](int64_t offset, int64_t, int, int) { element = offset; });
  }
  return operand.data + element * operand.element_size();
}

void write_back(const Segment& segment, int64_t start, const Run& run, size_t k) {
  const Operand& operand = segment.operands[k];
  if (operand.linear) return;
  with_item(operand, [&](auto item) {
    typedef decltype(item) Item;
    const auto* from = reinterpret_cast<const Item*>(run.data[k]);
    auto* to = reinterpret_cast<Item*>(operand.data);
    for_each_row(segment, operand, start, run.n,
                 [&](int64_t offset, int64_t stride, int at, int count) {
                   for (int i = 0; i < count; ++i) to[offset + i * stride] = from[at + i];
                 });
  });
}

}  // namespace cpu
}  // namespace rose
