#include "ranks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "../check.h"

namespace rose {
namespace cpu {

void Ranks::add_up(std::vector<int64_t>& state) const {
  Tensor tensor = torch::stable::empty({static_cast<int64_t>(state.size())}, ScalarType::Long);
  auto* const words = write_to<int64_t>(tensor);
  std::copy(state.begin(), state.end(), words);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(handle_)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("rose_ops::_add_over_ranks", "", stack.data(), TORCH_ABI_VERSION));
  ROSE_CHECK(torch::stable::detail::to<bool>(stack[0]), "the processes' numbers were not added up");
  std::copy(words, words + state.size(), state.begin());
}

}  // namespace cpu
}  // namespace rose
