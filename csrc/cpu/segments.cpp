#include "segments.h"

namespace rose {
namespace cpu {
namespace {

Dtype dtype_of(const Tensor& tensor, const char* role, size_t index) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, role, "[", index, "] has dtype ",
                      torch::headeronly::toString(tensor.scalar_type()),
                      "; expected float32, bfloat16 or float16");
  }
  return Dtype::kFloat32;
}

void check_same_sizes(const Tensor& a, const Tensor& b, const char* role, const char* first_role,
                      size_t index) {
  const auto x = a.sizes(), y = b.sizes();
  STD_TORCH_CHECK(x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin()), role, "[", index,
                  "] and ", first_role, "[", index, "] have different shapes; expected the same");
}

// Merge neighbouring dimensions that every operand walks as one, and drop those of size 1. Row-major
// order is kept, so an element has the same index whatever the strides.
void collapse(const std::vector<const Tensor*>& tensors, Segment& segment) {
  const auto sizes = tensors[0]->sizes();
  for (int64_t d = 0; d < static_cast<int64_t>(sizes.size()); ++d) {
    if (sizes[d] == 1) continue;
    bool merge = !segment.sizes.empty();
    for (size_t k = 0; merge && k < tensors.size(); ++k) {
      merge = segment.operands[k].strides.back() == tensors[k]->strides()[d] * sizes[d];
    }
    if (merge) {
      segment.sizes.back() *= sizes[d];
    } else {
      segment.sizes.push_back(sizes[d]);
    }
    for (size_t k = 0; k < tensors.size(); ++k) {
      auto& strides = segment.operands[k].strides;
      if (merge) strides.pop_back();
      strides.push_back(tensors[k]->strides()[d]);
    }
  }
  for (Operand& operand : segment.operands) {
    int64_t expected = 1;
    operand.linear = true;
    for (size_t d = segment.sizes.size(); d-- > 0; expected *= segment.sizes[d]) {
      operand.linear = operand.linear && operand.strides[d] == expected;
    }
  }
}

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

bool in_place(const Operand& operand) { return operand.linear && operand.dtype == Dtype::kFloat32; }

}  // namespace

Segments::Segments(const std::vector<Role>& roles) {
  const size_t count = roles[0].tensors->size();
  for (const Role& role : roles) {
    STD_TORCH_CHECK(role.tensors->size() == count, role.name, " has ", role.tensors->size(),
                    " tensors and ", roles[0].name, " has ", count, "; expected one for each");
  }
  segments_.resize(count);
  std::vector<const Tensor*> tensors(roles.size());
  for (size_t i = 0; i < count; ++i) {
    Segment& segment = segments_[i];
    segment.operands.resize(roles.size());
    bool contiguous = true;
    for (size_t k = 0; k < roles.size(); ++k) {
      const Tensor& tensor = (*roles[k].tensors)[i];
      tensors[k] = &tensor;
      STD_TORCH_CHECK(tensor.is_cpu(), roles[k].name, "[", i,
                      "] is not on the CPU; expected all tensors on one device");
      if (k > 0) check_same_sizes(tensor, *tensors[0], roles[k].name, roles[0].name, i);
      segment.operands[k].dtype = dtype_of(tensor, roles[k].name, i);
      segment.operands[k].data = static_cast<char*>(
          roles[k].written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()));
      contiguous = contiguous && tensor.is_contiguous();
    }
    segment.n = tensors[0]->numel();
    if (!contiguous && segment.n > 0) {
      collapse(tensors, segment);
      for (size_t k = 0; k < roles.size(); ++k) {
        const auto& strides = segment.operands[k].strides;
        const bool overlaps = std::count(strides.begin(), strides.end(), 0) > 0;
        STD_TORCH_CHECK(!roles[k].written || !overlaps, roles[k].name, "[", i,
                        "] is an expanded tensor, whose elements share memory; it cannot be updated "
                        "in place (use .contiguous())");
      }
    }
    segment.first_tile = tiles_;
    tiles_ += (segment.n + kTile - 1) / kTile;
    elements_ += segment.n;
  }
}

float* load(const Segment& segment, const Operand& operand, int64_t start, int n, float* buffer) {
  if (in_place(operand)) return reinterpret_cast<float*>(operand.data) + start;
  for_each_run(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int run) {
    tile_kernels().widen(operand.data + offset * operand.element_size(), operand.dtype, stride, run,
                         buffer + at);
  });
  return buffer;
}

void store(const Segment& segment, const Operand& operand, int64_t start, int n, const float* values) {
  if (in_place(operand)) return;
  for_each_run(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int run) {
    tile_kernels().narrow(values + at, operand.dtype, stride, run,
                          operand.data + offset * operand.element_size());
  });
}

void store_stochastic(const Segment& segment, const Operand& operand, int64_t start, int n,
                      const float* values, uint32_t key, int64_t index) {
  for_each_run(segment, operand, start, n, [&](int64_t offset, int64_t stride, int at, int run) {
    for (int done = 0; done < run;) {
      const uint64_t first = static_cast<uint64_t>(index + at + done);
      const uint64_t until_carry = (uint64_t{1} << 32) - (first & 0xFFFFFFFFu);
      const int part = static_cast<int>(std::min<uint64_t>(run - done, until_carry));
      tile_kernels().narrow_stochastic(values + at + done, stride, part,
                                       operand.data + (offset + done * stride) * operand.element_size(),
                                       key, static_cast<uint32_t>(first >> 32),
                                       static_cast<uint32_t>(first));
      done += part;
    }
  });
}

}  // namespace cpu
}  // namespace rose
