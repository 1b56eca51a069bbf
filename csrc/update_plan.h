// What an update is asked for, and all that is checked before one begins: the same for every backend.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "arguments.h"

namespace rose {

struct UpdateTensors {
  const std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &steps, &first_masks,
      &second_masks;
};

struct UpdateTables {
  const Tensor &lr, &hyper, &group, &offsets;
};

// Of what is stored in bfloat16: the `rounding` of an operator.
struct Rounding {
  uint32_t seed;
  bool stochastic;  // of parameters; second moments always are

  explicit Rounding(const std::vector<int64_t>& numbers);
};

// A captured mask of one tensor; of one that is not selective, none.
struct Mask {
  MaskKind kind = MaskKind::kNone;
  const uint8_t* data = nullptr;  // bits, or one bool
};

struct UpdatePlan {
  // Checks everything, changes nothing.
  UpdatePlan(const UpdateTensors& tensors, const UpdateTables& tables, const Ranking& wanted,
             torch::stable::Device device, int64_t tile);

  Segments segments;
  Groups groups;
  const double* lr;  // of each group, on the CPU or the device
  const int64_t* offsets;
  std::vector<float*> steps;
  bool fractional;  // an ensemble: M of an element is a sum of two masks
  MaskWeights weights;
  std::vector<std::array<Mask, 2>> masks;  // first and second order
  std::vector<size_t> selective;           // segments, those that a ranking is of
};

}  // namespace rose
