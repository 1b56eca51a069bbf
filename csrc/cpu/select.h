// The k-th smallest of all risks, exactly, without storing them: keys are recomputed from the gradients
// and moments whenever they are needed.
#pragma once

#include "pass.h"

namespace rose {
namespace cpu {

// The thresholds of the sample of selection="approx"; the rest of the record is not filled in.
Selection approx_thresholds(const Ranked& ranked);

// By the sample of selection="approx", with exact counts; or a bracket's pass that counts and logs
// keys; where it misses, or its log would be too long, a radix select, in three passes, finds the same
// keys. Luck decides the time only.
Selection select(const Ranked& ranked, bool approx = false);

// How many keys have each value of a digit of 16 bits, and how many elements are inactive and not
// finite; or, of the keys with such a digit, each value of the 15 bits below it.
std::vector<int64_t> count_keys(const RiskSource& source, std::optional<uint32_t> digit);

}  // namespace cpu
}  // namespace rose
