#include "update.h"

#include <cstring>

#include "../check.h"

namespace rose {
namespace cpu {
namespace {

constexpr size_t kWritten[3] = {0, 2, 3};  // operands: p, m, v

MaskOfRun mask_of(MaskKind kind, const Tensor& mask, const Argument& argument) {
  if (kind == MaskKind::kAll) return {nullptr, true};
  const auto* data = read_from<uint8_t>(mask, argument);
  if (kind == MaskKind::kBits) return {data, false};
  return {nullptr, *data != 0};
}

}  // namespace

Factors::Factors(const std::optional<Tensor>& scale, const std::optional<Tensor>& norm)
    : inv_scale(1), clip(1), plain_clip(1) {
  if (scale) {
    check_table(*scale, ScalarType::Float, 1, "inv_scale");
    inv_scale = *read_from<float>(*scale, "inv_scale");
  }
  if (norm) {
    check_table(*norm, ScalarType::Float, 2, "clip");
    const auto* factors = read_from<float>(*norm, "clip");
    clip = factors[0];
    plain_clip = factors[1];
  }
}

Updater::Updater(const UpdateTensors& tensors, const Tensor& lr, const Tensor& hyper,
                 const Tensor& group, const Tensor& offsets, const Factors& factors,
                 const UpdateSettings& settings)
    : segments_({{"params", &tensors.params, true},
                 {"grads", &tensors.grads, false},
                 {"exp_avgs", &tensors.exp_avgs, true},
                 {"exp_avg_sqs", &tensors.exp_avg_sqs, true}},
                kTile),
      groups_(hyper, group, segments_.size()),
      factors_(factors),
      settings_(settings) {
  const size_t count = segments_.size();
  check_table(lr, ScalarType::Double, groups_.count(), "lr");
  check_table(offsets, ScalarType::Long, static_cast<int64_t>(count), "offsets");
  lr_ = read_from<double>(lr, "lr");
  offsets_ = read_from<int64_t>(offsets, "offsets");
  ROSE_CHECK(tensors.steps.size() == count, "steps has ", tensors.steps.size(),
             " tensors; expected one for each of ", count, " parameters");
  for (size_t i = 0; i < count; ++i) {
    check_table(tensors.steps[i], ScalarType::Float, 1, "steps");
    steps_.push_back(write_to<float>(tensors.steps[i], {"steps", static_cast<int64_t>(i)}));
  }
  const bool has_first = !tensors.first_masks.empty();
  const bool has_second = settings.from_risk || !tensors.second_masks.empty();
  fractional_ = has_first && has_second;
  masks_.resize(count);
  const auto add = [&](const std::vector<Tensor>& masks, const char* name, MaskOfRun Masks::* to) {
    const auto kinds = check_masks(masks, segments_, name, torch::headeronly::DeviceType::CPU);
    for (size_t i = 0; i < masks.size(); ++i) {
      masks_[i].*to = mask_of(kinds[i], masks[i], {name, static_cast<int64_t>(i)});
    }
  };
  // One mask alone is the second one, whatever its name.
  add(tensors.first_masks, "first_masks", fractional_ ? &Masks::first : &Masks::second);
  add(tensors.second_masks, "second_masks", &Masks::second);
  for (size_t i = 0; i < count; ++i) {
    ROSE_CHECK(groups_[i].selective == 0 || has_first || has_second, "params[", i,
               "] is selective; expected first_masks, second_masks or a selection");
  }
}

void Updater::begin() {
  updates_.resize(segments_.size());
  random_keys_.resize(segments_.size());
  for (size_t i = 0; i < segments_.size(); ++i) {
    const float step = *steps_[i] = next_step(*steps_[i]);
    updates_[i] = make_update(groups_[i], lr_[groups_.row(i)], step, settings_.gamma);
    random_keys_[i] = random_key(settings_.seed, step_word(step));
  }
}

Step Updater::step_of(size_t index, int64_t start) const {
  const uint64_t global = static_cast<uint64_t>(offsets_[index] + start);
  Step step;
  step.update = &updates_[index];
  step.ranked = settings_.from_risk;
  step.fractional = fractional_;
  step.first = masks_[index].first;
  step.second = masks_[index].second;
  if (step.first.bits) step.first.bits += start / 8;
  if (step.second.bits) step.second.bits += start / 8;
  step.stochastic = settings_.stochastic;
  step.random_index = static_cast<uint32_t>(global);
  for (uint32_t k = 0; k < 2; ++k) {
    step.random_keys[k] = mix((static_cast<uint32_t>(global >> 32) + k) ^ random_keys_[index]);
  }
  return step;
}

void Updater::run(size_t index, int64_t start, int n, uint32_t place, const Stage& stage, Notes& notes,
                  UpdateCounts& counts) {
  const Segment& segment = segments_[index];
  Buffers buffers;
  Run run = open_run(segment, start, n, buffers);
  run.factors[0] = static_cast<float>(groups_[index].sign) * factors_.inv_scale;
  run.factors[1] = groups_[index].selective != 0 ? factors_.clip : factors_.plain_clip;
  run.place = place;
  const Step step = step_of(index, start);
  const auto none = [](const MaskOfRun& mask) { return mask.bits == nullptr && !mask.all; };
  if (groups_[index].selective == 0) {
    loops().adamw(run, step);
    counts.updated += n;
  } else if (!step.ranked && none(step.first) && none(step.second)) {
    loops().decay(run, step);
    return write_back(segment, start, run, 3);
  } else {
    const Risk risk = {true, settings_.rank_inactive, groups_.alpha(index)};
    loops().masked(run, step, risk, stage, notes, counts);
  }
  for (const size_t k : kWritten) write_back(segment, start, run, k);
}

void Updater::prefetch(size_t index, int64_t element) const {
  for (const size_t k : kWritten) {
    const Operand& operand = segments_[index].operands[k];
    if (operand.linear) __builtin_prefetch(operand.data + element * operand.element_size(), 1);
  }
}

int Updater::redo(size_t index, int64_t element, const float* old, bool selected) {
  const Segment& segment = segments_[index];
  const MaskOfRun first = masks_[index].first;
  const bool has_first =
      fractional_ && (first.bits ? first.bits[element / 8] >> (element % 8) & 1 : first.all);
  float values[3] = {old[0], old[1], old[2]};
  const int alone = fractional_ ? 2 : 3, kind = (has_first ? 1 : 0) + (selected ? alone : 0);
  if (fractional_) {
    adamw_element<true>(values[0], values[1], values[2], old[3], kind, updates_[index]);
  } else {
    adamw_element<false>(values[0], values[1], values[2], old[3], kind, updates_[index]);
  }
  for (int k = 0; k < 3; ++k) {
    const Operand& to = segment.operands[kWritten[k]];
    char* const place = place_of(segment, to, element);
    const auto what = k == 0 ? Rounded::kParameter : Rounded::kSecondMoment;
    if (to.dtype == Dtype::kFloat32) {
      std::memcpy(place, &values[k], sizeof(float));
      continue;
    }
    uint16_t half;
    if (to.dtype == Dtype::kFloat16) {
      half = float_to_half(values[k]);
    } else if (k == 2 || (k == 0 && settings_.stochastic)) {
      const auto global = static_cast<uint64_t>(offsets_[index] + element);
      half = float_to_bf16_stochastic(values[k], rounding_bits(random_keys_[index], global, what));
    } else {
      half = float_to_bf16(values[k]);
    }
    std::memcpy(place, &half, sizeof half);
  }
  return (kind != 0) - (has_first || !selected);
}

}  // namespace cpu
}  // namespace rose
