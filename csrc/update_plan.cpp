#include "update_plan.h"

#include "check.h"

namespace rose {
namespace {

Mask checked(const Tensor& mask, int64_t n, const Argument& argument, torch::stable::Device device) {
  if (mask.numel() == 0) return {MaskKind::kAll, nullptr};
  const bool whole = mask.scalar_type() == ScalarType::Bool;
  check_table(mask, whole ? ScalarType::Bool : ScalarType::Byte, whole ? 1 : (n + 7) / 8, argument.name,
              device);
  return {whole ? MaskKind::kWhole : MaskKind::kBits, read_from<uint8_t>(mask, argument)};
}

}  // namespace

Rounding::Rounding(const std::vector<int64_t>& numbers) {
  ROSE_CHECK(numbers.size() == 2, "rounding has ", numbers.size(),
             " numbers; expected seed and stochastic");
  seed = static_cast<uint32_t>(numbers[0]);
  stochastic = numbers[1] != 0;
}

UpdatePlan::UpdatePlan(const UpdateTensors& tensors, const UpdateTables& tables, const Ranking& wanted,
                       torch::stable::Device device, int64_t tile)
    : segments({{"params", &tensors.params, true},
                {"grads", &tensors.grads, false},
                {"exp_avgs", &tensors.exp_avgs, true},
                {"exp_avg_sqs", &tensors.exp_avg_sqs, true}},
               tile),
      groups(tables.hyper, tables.group, segments.size()) {
  const size_t count = segments.size();
  const Tensor& rates = tables.lr;
  check_table(rates, ScalarType::Double, groups.count(), "lr",
              rates.is_cpu() ? rates.device() : device);
  check_table(tables.offsets, ScalarType::Long, static_cast<int64_t>(count), "offsets");
  lr = read_from<double>(rates, "lr");
  offsets = read_from<int64_t>(tables.offsets, "offsets");
  ROSE_CHECK(tensors.steps.size() == count, "steps has ", tensors.steps.size(),
             " tensors; expected one for each of ", count, " parameters");
  for (size_t i = 0; i < count; ++i) {
    check_table(tensors.steps[i], ScalarType::Float, 1, "steps", device);
    steps.push_back(write_to<float>(tensors.steps[i], {"steps", static_cast<int64_t>(i)}));
    if (groups[i].selective != 0) selective.push_back(i);
  }
  ROSE_CHECK(!wanted.ranks || tensors.second_masks.empty(),
             "both record and second_masks are given; expected one second-order mask");
  const bool has_first = !tensors.first_masks.empty();
  const bool has_second = wanted.ranks || !tensors.second_masks.empty();
  ROSE_CHECK(selective.empty() || has_first || has_second, "params[", selective.front(),
             "] is selective; expected first_masks, second_masks or a selection");
  fractional = has_first && has_second;
  weights = fractional ? kWeightsOfEnsemble : kWeightsOfOne;
  masks.resize(count);
  const auto add = [&](const std::vector<Tensor>& all, const char* name, size_t order) {
    if (all.empty()) return;
    ROSE_CHECK(all.size() == count, name, " has ", all.size(),
               " tensors; expected none or one for each of ", count, " parameters");
    for (size_t i = 0; i < count; ++i) {
      const Mask mask = checked(all[i], segments[i].n, {name, static_cast<int64_t>(i)}, device);
      if (groups[i].selective != 0) masks[i][order] = mask;
    }
  };
  add(tensors.first_masks, "first_masks", 0);
  add(tensors.second_masks, "second_masks", 1);
}

}  // namespace rose
