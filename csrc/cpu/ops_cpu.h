// The operators on the CPU.
#pragma once

#include "../operators.h"

namespace rose {
namespace cpu {

struct Operators {
  static RankSignature rank_;
  static StepSignature step_;
  static CountKeysSignature count_keys;
  static SumsOfSquaresSignature sums_of_squares;
  static ClipFactorsSignature clip_factors;
  static SelectTensorsSignature select_tensors_;
};

// For tests: the fields of BracketReport of this thread's latest bracketed call.
Tensor latest_bracket_report();

}  // namespace cpu
}  // namespace rose
