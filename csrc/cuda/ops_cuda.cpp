#include "ops_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "upload.h"

namespace rose {
namespace cuda {
namespace ops {
namespace {

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

torch::stable::Device device_of(const std::vector<Tensor>& tensors) {
#ifdef ROSE_SIMT
  return torch::headeronly::DeviceType::CPU;
#else
  if (!tensors.empty()) return tensors[0].device();
  return {torch::headeronly::DeviceType::CUDA, torch::stable::accelerator::getCurrentDeviceIndex()};
#endif
}

// Data of an optional float32 tensor on the device.
const float* floats(const std::optional<Tensor>& tensor, int64_t numel, const char* name,
                    const Context& context) {
  if (!tensor) return nullptr;
  check_table(*tensor, ScalarType::Float, numel, name, context.device());
  return tensor->const_data_ptr<float>();
}

const int64_t* record(const Tensor& selection, const Context& context) {
  check_table(selection, ScalarType::Long, 8, "selection", context.device());
  return selection.const_data_ptr<int64_t>();
}

}  // namespace

Tensor select(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, Tensor hyper, Tensor group,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip, int64_t upper, int64_t lower,
              bool rank_inactive, bool approx) {
  check_fractions(upper, lower);
  const Context context(device_of(grads));
  const Segments layout(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, layout.size());
  const DeviceTable table(HostTable(layout, &groups), context);
  const float* scale = floats(inv_scale, 1, "inv_scale", context);
  const float* clips = floats(clip, 2, "clip", context);
  Tensor result = context.empty(8, ScalarType::Long);
  const int64_t n = layout.elements(), positions = layout.tiles() * kTile;
  // Room for the window around a threshold. Where it holds all keys, there is nothing to sample.
  const int64_t capacity = std::max(n / 32, std::min<int64_t>(n, 1 << 18));
  const int64_t most = std::clamp<int64_t>(n / (128 * kWarp), 1 << 11, 1 << 15);
  const int64_t lines = approx || n <= capacity ? 0 : most;
  Tensor state = context.empty((sizeof(SelectState) + 7) / 8, ScalarType::Long);
  Tensor log = context.empty(approx ? 0 : capacity * (lower > 0 ? 2 : 1), ScalarType::Int);
  const Tensor sample = zeros_of_stream(context, (sizeof(Sample) + 7) / 8);
  check(cuda::select({{table.table, scale, clips, !exp_avgs.empty(), rank_inactive},
                      static_cast<Sample*>(sample.mutable_data_ptr()),
                      lines,
                      lines == 0 ? 0 : positions / lines,
                      static_cast<SelectState*>(state.mutable_data_ptr()),
                      static_cast<uint32_t*>(log.mutable_data_ptr()),
                      capacity,
                      static_cast<double>(capacity) / static_cast<double>(std::max<int64_t>(n, 1)),
                      result.mutable_data_ptr<int64_t>(),
                      upper,
                      lower,
                      approx},
                     context.stream()));
  return result;
}

void capture_(std::vector<Tensor> masks, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              Tensor hyper, Tensor group, std::optional<Tensor> inv_scale,
              std::optional<Tensor> clip, Tensor selection, bool rank_inactive) {
  const Context context(device_of(grads));
  const Segments layout(risk_roles(grads, exp_avgs), kTile);
  const Groups groups(hyper, group, layout.size());
  HostTable host(layout, &groups);
  STD_TORCH_CHECK(masks.size() == layout.size(), "masks has ", masks.size(),
                  " tensors; expected one for each of ", layout.size(), " gradients");
  for (size_t i = 0; i < masks.size(); ++i) {
    check_table(masks[i], ScalarType::Byte, (layout[i].n + 7) / 8, "masks", context.device());
    host.segments[i].bits = masks[i].mutable_data_ptr<uint8_t>();
  }
  const DeviceTable table(host, context);
  check(cuda::capture(
      {{table.table, floats(inv_scale, 1, "inv_scale", context), floats(clip, 2, "clip", context),
        !exp_avgs.empty(), rank_inactive},
       record(selection, context)},
      context.stream()));
}

Tensor adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
              std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
              std::vector<Tensor> first_masks, std::vector<Tensor> second_masks,
              std::optional<Tensor> selection, Tensor lr, Tensor hyper, Tensor group, Tensor offsets,
              std::optional<Tensor> inv_scale, std::optional<Tensor> clip,
              std::optional<Tensor> found_inf, double gamma, bool rank_inactive, int64_t seed,
              bool stochastic) {
  const Context context(device_of(params));
  const Segments layout({{"params", &params, true},
                         {"grads", &grads, false},
                         {"exp_avgs", &exp_avgs, true},
                         {"exp_avg_sqs", &exp_avg_sqs, true}},
                        kTile);
  const size_t count = layout.size();
  const Groups groups(hyper, group, count);
  check_table(offsets, ScalarType::Long, static_cast<int64_t>(count), "offsets");
  check_table(lr, ScalarType::Double, groups.count(), "lr",
              lr.is_cpu() ? lr.device() : context.device());
  STD_TORCH_CHECK(steps.size() == count, "steps has ", steps.size(),
                  " tensors; expected one for each of ", count, " parameters");
  STD_TORCH_CHECK(!selection || second_masks.empty(),
                  "both selection and second_masks are given; expected one second-order mask");
  const bool has_first = !first_masks.empty(), has_second = selection || !second_masks.empty();
  const auto first = check_masks(first_masks, layout, "first_masks", context.device());
  const auto second = check_masks(second_masks, layout, "second_masks", context.device());

  HostTable host(layout, &groups);
  for (size_t i = 0; i < count; ++i) {
    check_table(steps[i], ScalarType::Float, 1, "steps", context.device());
    Segment& segment = host.segments[i];
    STD_TORCH_CHECK(!segment.selective || has_first || has_second, "params[", i,
                    "] is selective; expected first_masks, second_masks or a selection");
    segment.step = steps[i].mutable_data_ptr<float>();
    segment.offset = offsets.const_data_ptr<int64_t>()[i];
    if (!segment.selective) continue;
    segment.mask_kinds[0] = first[i];
    segment.mask_kinds[1] = second[i];
    if (has_first) segment.masks[0] = static_cast<const uint8_t*>(first_masks[i].const_data_ptr());
    if (!second_masks.empty()) {
      segment.masks[1] = static_cast<const uint8_t*>(second_masks[i].const_data_ptr());
    }
  }
  const double* lrs = lr.const_data_ptr<double>();
  if (lr.is_cpu()) host.lr.assign(lrs, lrs + groups.count());
  const DeviceTable table(host, context);

  UpdateArguments arguments;
  arguments.table = table.table;
  arguments.lr = lr.is_cpu() ? table.lr : lrs;
  arguments.inv_scale = floats(inv_scale, 1, "inv_scale", context);
  arguments.clip = floats(clip, 2, "clip", context);
  arguments.found_inf = floats(found_inf, 1, "found_inf", context);
  arguments.selection = selection ? record(*selection, context) : nullptr;
  arguments.from_risk = selection.has_value();
  Tensor prepared = context.empty(static_cast<int64_t>(count * sizeof(Prepared)), ScalarType::Byte);
  arguments.prepared = static_cast<Prepared*>(prepared.mutable_data_ptr());
  Tensor counts = context.empty(2, ScalarType::Long);
  arguments.counts = static_cast<Count*>(counts.mutable_data_ptr());
  arguments.gamma = gamma;
  arguments.fractional = has_first && has_second;
  arguments.first_weight = arguments.fractional ? 1 : 3;
  arguments.second_weight = arguments.fractional ? 2 : 3;
  arguments.rank_inactive = rank_inactive;
  arguments.stochastic = stochastic;
  arguments.seed = static_cast<uint32_t>(seed);
  check(cuda::update(arguments, context.stream()));
  return counts;
}

Tensor sums_of_squares(std::vector<Tensor> tensors, std::optional<Tensor> inv_scale) {
  const Context context(device_of(tensors));
  const Segments layout({{"tensors", &tensors, false}}, kTile);
  const int64_t count = static_cast<int64_t>(layout.size());
  const DeviceTable table(HostTable(layout), context);
  Tensor partial = context.empty(layout.tiles(), ScalarType::Double);
  Tensor result = context.empty(count, ScalarType::Double);
  check(cuda::sums_of_squares(
      {table.table, floats(inv_scale, 1, "inv_scale", context), partial.mutable_data_ptr<double>(),
       result.mutable_data_ptr<double>()},
      context.stream()));
  return result;
}

}  // namespace ops
}  // namespace cuda
}  // namespace rose
