#include "arguments.h"

#include "check.h"

namespace rose {

static_assert(sizeof(Hyper) == 6 * sizeof(double), "hyper is a float64 tensor of 6 columns");
constexpr int64_t kColumns = 6;

void check_table(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name,
                 torch::stable::Device device) {
  ROSE_CHECK(tensor.device() == device && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                 tensor.numel() == numel,
             name, " must be a contiguous tensor of ", torch::headeronly::toString(dtype), " with ",
             numel, " elements, on ", device.is_cpu() ? "the CPU" : "the device of the parameters");
}

void check_fractions(int64_t upper, int64_t lower) {
  ROSE_CHECK(0 <= lower && lower < upper && upper <= kFractionUnit,
             "expected 0 <= lower < upper <= ", kFractionUnit, " (units of 1e-9); got lower ", lower,
             " and upper ", upper);
}

void check_tensors(const Tensor& mask, const Tensor& sums, const std::optional<Tensor>& exp_avg_sums,
                   int64_t upper, int64_t lower) {
  check_fractions(upper, lower);
  const int64_t count = mask.numel();
  ROSE_CHECK(count <= UINT32_MAX, "mask has ", count, " elements; expected less than 2^32");
  check_table(mask, ScalarType::Bool, count, "mask", mask.device());
  check_table(sums, ScalarType::Double, count, "sums", mask.device());
  if (exp_avg_sums) {
    check_table(*exp_avg_sums, ScalarType::Double, count, "exp_avg_sums", mask.device());
  }
}

Groups::Groups(const Tensor& hyper, const Tensor& group, size_t tensors)
    : count_(hyper.numel() / kColumns) {
  check_table(hyper, ScalarType::Double, count_ * kColumns, "hyper");
  check_table(group, ScalarType::Long, static_cast<int64_t>(tensors), "group");
  hyper_ = read_from<Hyper>(hyper, "hyper");
  group_ = read_from<int64_t>(group, "group");
  for (size_t i = 0; i < tensors; ++i) {
    ROSE_CHECK(group_[i] >= 0 && group_[i] < count_, "group[", i, "] is ", group_[i],
               "; expected a row of hyper, which has ", count_);
  }
}

std::vector<MaskKind> check_masks(const std::vector<Tensor>& masks, const Segments& segments,
                                  const char* name, torch::stable::Device device) {
  std::vector<MaskKind> kinds(segments.size(), MaskKind::kNone);
  if (masks.empty()) return kinds;
  ROSE_CHECK(masks.size() == segments.size(), name, " has ", masks.size(),
             " tensors; expected none or one for each of ", segments.size(), " parameters");
  for (size_t i = 0; i < masks.size(); ++i) {
    const bool whole = masks[i].scalar_type() == ScalarType::Bool;
    kinds[i] = masks[i].numel() == 0 ? MaskKind::kAll : whole ? MaskKind::kWhole : MaskKind::kBits;
    if (kinds[i] == MaskKind::kAll) continue;
    check_table(masks[i], whole ? ScalarType::Bool : ScalarType::Byte,
                whole ? 1 : (segments[i].n + 7) / 8, name, device);
  }
  return kinds;
}

std::vector<Role> risk_roles(const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs) {
  std::vector<Role> roles{{"grads", &grads, false}};
  if (!exp_avgs.empty()) roles.push_back({"exp_avgs", &exp_avgs, false});
  return roles;
}

}  // namespace rose
