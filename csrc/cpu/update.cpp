#include "update.h"

#include <algorithm>

#include "../check.h"

namespace rose {
namespace cpu {
namespace {

constexpr size_t kWritten[3] = {0, 2, 3};  // operands: p, m, v

// Adds a captured mask to the masks of each tensor.
void add_masks(const std::vector<Tensor>& tensors, const Segments& segments, const char* name,
               int32_t weight, const uint8_t* Masks::* bits, std::vector<Masks>& masks) {
  const auto kinds = check_masks(tensors, segments, name, torch::headeronly::DeviceType::CPU);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto* data = read_from<uint8_t>(tensors[i], {name, static_cast<int64_t>(i)});
    if (kinds[i] == MaskKind::kBits) {
      masks[i].*bits = data;
    } else if (kinds[i] == MaskKind::kAll || *data != 0) {
      masks[i].base += weight;
    }
  }
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
  Masks shared;
  shared.fractional = has_first && has_second;
  shared.first_weight = shared.fractional ? 1 : 3;
  shared.second_weight = shared.fractional ? 2 : 3;
  shared.rank_inactive = settings.rank_inactive;
  shared.from_risk = settings.from_risk;
  masks_.assign(count, shared);
  if (has_first) {
    add_masks(tensors.first_masks, segments_, "first_masks", shared.first_weight, &Masks::first_bits,
              masks_);
  }
  if (!tensors.second_masks.empty()) {
    add_masks(tensors.second_masks, segments_, "second_masks", shared.second_weight,
              &Masks::second_bits, masks_);
  }
  for (size_t i = 0; i < count; ++i) {
    ROSE_CHECK(groups_[i].selective == 0 || has_first || has_second, "params[", i,
               "] is selective; expected first_masks, second_masks or a selection");
    masks_[i].alpha = groups_.alpha(i);
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

void Updater::store_operand(size_t index, size_t k, int64_t start, int n, const float* values) const {
  const Segment& segment = segments_[index];
  const Operand& to = segment.operands[k];
  if (to.dtype == Dtype::kBFloat16 && (k == 3 || (k == 0 && settings_.stochastic))) {
    store_stochastic(segment, to, start, n, values, random_keys_[index], offsets_[index] + start,
                     k == 0 ? Rounded::kParameter : Rounded::kSecondMoment);
  } else {
    store(segment, to, start, n, values);
  }
}

void Updater::tile(size_t index, int64_t start, int n, Bounds bounds, BracketLog* log,
                   UpdateCounts& counts) {
  // Where elements pass through buffers, fewer at a time: those of one part are at work while the CPU
  // reads the next.
  constexpr int kPart = kTile / 4;
  const std::vector<Operand>& all = segments_[index].operands;
  if (n > kPart &&
      !std::all_of(all.begin(), all.end(), [](const Operand& x) { return x.contiguous_floats(); })) {
    const int64_t place = log ? log->place : 0;
    for (int done = 0; done < n; done += kPart) {
      if (log) log->place = place + done;
      tile(index, start + done, std::min(kPart, n - done), bounds, log, counts);
    }
    return;
  }
  const TileKernels& kernels = tile_kernels();
  const Segment& segment = segments_[index];
  const std::vector<Operand>& operands = segment.operands;
  const bool selective = groups_[index].selective != 0;
  Masks masks = masks_[index];
  float buffers[5][kTile];
  float* m = load(segment, operands[2], start, n, buffers[2]);
  float* v = load(segment, operands[3], start, n, buffers[3]);
  if (selective && !masks.from_risk && masks.base == 0 && !masks.first_bits && !masks.second_bits) {
    kernels.decay(m, v, n, updates_[index]);  // nothing of the tensor is selected
    store_operand(index, 3, start, n, v);
    return;
  }
  float* p = load(segment, operands[0], start, n, buffers[0]);
  const float* g = load(segment, operands[1], start, n, buffers[1]);
  const float factor = gradient_factor(index), clip = clip_factor(index);
  if (selective) {
    masks.factors[0] = factor;
    masks.factors[1] = clip;
    masks.bounds = bounds;
    if (masks.first_bits) masks.first_bits += start / 8;
    if (masks.second_bits) masks.second_bits += start / 8;
    kernels.masked_adamw(p, m, v, g, masks, n, updates_[index], counts, log);
  } else {
    if (factor != 1.0f || clip != 1.0f) {
      kernels.scale(g, factor, clip, n, buffers[4]);
      g = buffers[4];
    }
    kernels.adamw(p, m, v, g, n, updates_[index]);
    counts.updated += n;
  }
  store_operand(index, 0, start, n, p);
  store_operand(index, 2, start, n, m);
  store_operand(index, 3, start, n, v);
}

void Updater::prefetch(size_t index, int64_t element) const {
  for (const size_t k : kWritten) {
    const Operand& operand = segments_[index].operands[k];
    if (operand.linear) __builtin_prefetch(operand.data + element * operand.element_size(), 1);
  }
}

int Updater::redo(size_t index, int64_t element, const float* old, bool selected) {
  const Segment& segment = segments_[index];
  const Masks& masks = masks_[index];
  int rest = masks.base;
  if (masks.first_bits) {
    rest += (masks.first_bits[element / 8] >> (element % 8) & 1) * masks.first_weight;
  }
  const int kind = rest + (selected ? masks.second_weight : 0);
  float p = old[0], m = old[1], v = old[2], buffer;
  const float g = old[3];
  if (masks.fractional) {
    adamw_element<true>(p, m, v, g, kind, updates_[index]);
  } else {
    adamw_element<false>(p, m, v, g, kind, updates_[index]);
  }
  // store() leaves alone what is float32 and linear, since a tile's is updated in place.
  const float values[3] = {p, m, v};
  for (int k = 0; k < 3; ++k) {
    *load(segment, segment.operands[kWritten[k]], element, 1, &buffer) = values[k];
    store_operand(index, kWritten[k], element, 1, &values[k]);
  }
  return (kind != 0) - (rest + (selected ? 0 : masks.second_weight) != 0);
}

}  // namespace cpu
}  // namespace rose
