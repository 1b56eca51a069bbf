#include "segments.h"

#include "check.h"

namespace rose {
namespace {

Dtype dtype_of(const Tensor& tensor, const Argument& argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(argument, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
           "; expected float32, bfloat16 or float16");
  }
}

template <typename Sizes>
bool same(const Sizes& a, const Sizes& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
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

}  // namespace

Segments::Segments(const std::vector<Role>& roles, int64_t tile) {
  const size_t count = roles[0].tensors->size();
  for (const Role& role : roles) {
    ROSE_CHECK(role.tensors->size() == count, role.name, " has ", role.tensors->size(), " tensors and ",
               roles[0].name, " has ", count, "; expected one for each");
  }
  if (count == 0) return;
  segments_.resize(count);
  const auto device = (*roles[0].tensors)[0].device();
  std::vector<const Tensor*> tensors(roles.size());
  for (size_t i = 0; i < count; ++i) {
    Segment& segment = segments_[i];
    segment.operands.resize(roles.size());
    bool contiguous = true;
    const auto sizes = (*roles[0].tensors)[i].sizes();
    for (size_t k = 0; k < roles.size(); ++k) {
      const Tensor& tensor = (*roles[k].tensors)[i];
      const Argument argument(roles[k].name, static_cast<int64_t>(i));
      tensors[k] = &tensor;
      ROSE_CHECK(tensor.device() == device, argument, " is on another device than ", roles[0].name,
                 "[0]; expected all on one");
      ROSE_CHECK(k == 0 || same(tensor.sizes(), sizes), argument, " and ", roles[0].name, "[", i,
                 "] have different shapes; expected the same");
      segment.operands[k].dtype = dtype_of(tensor, argument);
      segment.operands[k].data =
          static_cast<char*>(memory_of(tensor, argument, roles[k].written ? Use::kWrite : Use::kRead));
      contiguous = contiguous && tensor.is_contiguous();
    }
    segment.n = tensors[0]->numel();
    if (!contiguous && segment.n > 0) {
      collapse(tensors, segment);
      for (size_t k = 0; k < roles.size(); ++k) {
        const auto& strides = segment.operands[k].strides;
        const bool overlaps = std::count(strides.begin(), strides.end(), 0) > 0;
        ROSE_CHECK(!roles[k].written || !overlaps, roles[k].name, "[", i,
                   "] is an expanded tensor, whose elements share memory; it cannot be updated "
                   "in place (use .contiguous())");
      }
    }
    segment.first_tile = tiles_;
    tiles_ += (segment.n + tile - 1) / tile;
    elements_ += segment.n;
  }
}

}  // namespace rose
