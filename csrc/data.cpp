#include "data.h"

#include "check.h"

namespace rose {
namespace {

// From the start of a storage, up to the last element.
int64_t elements_needed(const Tensor& tensor, int64_t numel) {
  if (tensor.is_contiguous()) return tensor.storage_offset() + numel;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = tensor.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return last + 1;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Argument& argument) {
  out << argument.name;
  return argument.index < 0 ? out : out << "[" << argument.index << "]";
}

void* memory_of(const Tensor& tensor, const Argument& argument, Use use) {
  if (const int64_t numel = tensor.numel(); numel > 0) {
    int64_t size = 0;
    ROSE_CHECK(aoti_torch_get_storage_size(tensor.get(), &size) == TORCH_SUCCESS, argument,
               " has no storage; expected a dense tensor");
    const int64_t needed = elements_needed(tensor, numel) * static_cast<int64_t>(tensor.element_size());
    ROSE_CHECK(needed <= size, argument, " has a storage of ", size, " bytes and needs ", needed,
               ": it was freed or made smaller, as FSDP does with resize_(0); step where parameters, "
               "gradients and state are materialized");
  }
  return use == Use::kWrite ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
}

}  // namespace rose
