// The loops of loops.h for one instruction set: ROSE_ISA names it, and the including file has set the
// compiler's target. Nothing here may call a library template: see element.h on linkage.
//
// A loop is one loop: load, compare, update, store, and a branch that is rarely taken, for lanes that
// comparisons leave open.

#define ROSE_MEMBER inline __attribute__((always_inline))

namespace rose {
namespace cpu {
namespace {

#include "lanes.h"
#include "numbers.inl"
#include "rank.inl"
#include "step.inl"

}  // namespace

extern const Loops ROSE_ISA;
const Loops ROSE_ISA = {
    ROSE_ISA_NAME, masked, adamw,          decay,          rank,
    digits,        sample, logged_between, logged_wrongly, sum_of_squares,
};

}  // namespace cpu
}  // namespace rose
