// The operators on CUDA devices.
#pragma once

#include "../operators.h"

namespace rose {
namespace cuda {

struct Operators {
  static RankSignature rank_;
  static StepSignature step_;
  static SumsOfSquaresSignature sums_of_squares;
  static ClipFactorsSignature clip_factors;
  static SelectTensorsSignature select_tensors_;
};

}  // namespace cuda
}  // namespace rose
