"""What is where in the memory that the host and kernels, or several of these, have in common.

A row describes a segment, which is one tensor, or those of one update that belong together. A record
is that of a selection (:class:`rose_ops.definitions.Field`); in that of an update, two counts follow.
"""

from __future__ import annotations

import triton.language as tl

from rose_ops.definitions import Field, Hyper

# Columns of a row: int64.
N = tl.constexpr(0)  # elements
FIRST_TILE = tl.constexpr(1)  # of those of its class
OFFSET = tl.constexpr(2)  # global index of element 0
DATA = tl.constexpr(3)  # addresses of up to 4 operands
MASKS = tl.constexpr(7)  # addresses; first and second order
MASK_KINDS = tl.constexpr(9)  # likewise
BITS = tl.constexpr(11)  # address of the mask to write; or 0
STEP = tl.constexpr(12)  # address
GROUP = tl.constexpr(13)  # row of the hyperparameters
DIMS = tl.constexpr(14)  # that an element's place is found by; 0: every operand is linear
FIRST_DIM = tl.constexpr(15)  # among those of all segments
INDEX = tl.constexpr(16)  # in the lists of tensors
FIRST_LINE = tl.constexpr(17)  # of those that can be sampled
COLUMNS = tl.constexpr(18)

OPERANDS = tl.constexpr(4)
DIM = tl.constexpr(5)  # words of a dim: its size, and the strides of operands
KEYS = tl.constexpr(3)  # as a dtype: not numbers to rank, but their keys
NO_MASK, MASK_OF_BITS, MASK_OF_ONE, MASK_OF_ALL = (tl.constexpr(i) for i in range(4))

# Columns of the hyperparameters: float64.
HYPER_BETA1, HYPER_BETA2, HYPER_EPS, HYPER_WEIGHT_DECAY, HYPER_SIGN, HYPER_SELECTIVE = (
    tl.constexpr(int(h)) for h in Hyper
)
HYPER = tl.constexpr(len(Hyper))

# What the elements of a segment have in common in an update: float32. REST1, REST2 and REST are 1 less
# beta1, beta2 and gamma. Steps and decays are those of elements that gamma, the rest or all is for.
BETA1, REST1, BETA2, REST2, EPS, INV_ROOT_BIAS2 = (tl.constexpr(i) for i in range(6))
GAMMA, REST = tl.constexpr(6), tl.constexpr(7)
GAMMA_STEP, REST_STEP, FULL_STEP = (tl.constexpr(i) for i in (8, 9, 10))
GAMMA_DECAY, REST_DECAY, FULL_DECAY = (tl.constexpr(i) for i in (11, 12, 13))
PREPARED = tl.constexpr(16)

# A record.
HIGH, LOW, KEPT, RANKED, INACTIVE, NONFINITE, MISSES, FIELDS = (tl.constexpr(int(f)) for f in Field)
UPDATED = FIELDS
UPDATE_NONFINITE = FIELDS + 1
RECORD = FIELDS + 2

# The state of a selection by radix; see select.py. Of two thresholds, the upper one comes first.
BINS = tl.constexpr(256)
ROUNDS = tl.constexpr(4)  # of 8 bits each, but 7 in the last
SELECT_RANKED, SELECT_INACTIVE, SELECT_NONFINITE = (tl.constexpr(i) for i in range(3))
SELECT_TICKETS = tl.constexpr(3)  # of each round
SELECT_TARGETS = tl.constexpr(8)
SELECT_HISTOGRAMS = tl.constexpr(16)  # BINS of each threshold
SELECT_STATE = SELECT_HISTOGRAMS + 2 * BINS
# Words of a target, the RANK-th smallest key (0: it is not looked for): BELOW are less than those with
# the bits of PREFIX, and INSIDE have them.
RANK, BELOW, PREFIX, INSIDE = (tl.constexpr(i) for i in range(4))
SELECT_TARGET = tl.constexpr(4)

# The state of a step in one pass; see bracket.py. The first ZEROED words start as 0.
WINDOW_BINS = tl.constexpr(2048)
FIRST_BINS = tl.constexpr(1 << 15)
SECOND_BINS = tl.constexpr(1 << 16)
SLOTS = tl.constexpr(64)  # copies of the counters: atomics on one word would queue
BRACKET_TICKET = tl.constexpr(0)
RESOLVE_TICKET = tl.constexpr(1)
LOGGED = tl.constexpr(2)  # entries of the log, or more than there is room for
MODE = tl.constexpr(3)
SPECULATE, EXACT = tl.constexpr(0), tl.constexpr(1)  # modes
SAMPLED = tl.constexpr(4)  # elements that are ranked
ESTIMATE = tl.constexpr(8)  # of each threshold: the first words of a record
TARGETS = tl.constexpr(16)
TARGET = tl.constexpr(16)
COUNTERS = TARGETS + 2 * TARGET  # of the pass: COUNTS in each slot
COUNTS = tl.constexpr(8)
WINDOWS = COUNTERS + SLOTS * COUNTS  # WINDOW_BINS of the sample for each threshold
ZEROED = WINDOWS + 2 * WINDOW_BINS
FIRST_DIGITS = ZEROED
SECOND_DIGITS = FIRST_DIGITS + 2 * FIRST_BINS
STATE = SECOND_DIGITS + 2 * SECOND_BINS

# Words of a target of a step in one pass.
BRACKET_LOW, BRACKET_END = tl.constexpr(0), tl.constexpr(1)  # both 0: there is none
SHIFT = tl.constexpr(3)  # from a key in the bracket to its bin
COLLAPSED = tl.constexpr(4)  # the bracket is one key, that of a class of ties, which is not logged
WINDOW_LOW, WINDOW_HIGH, MIDDLE = (tl.constexpr(i) for i in (5, 6, 7))
# Of the sample: keys below the window, at or below the middle, and at it.
BELOW_WINDOW, UPTO_MIDDLE, AT_MIDDLE = (tl.constexpr(i) for i in (8, 9, 10))
# Sums of products of the differences between neighbouring lines, of their elements that are ranked (r)
# and of those that are at or below the middle (c), too.
CC, CR, RR = (tl.constexpr(i) for i in (11, 12, 13))

# Counters of the pass. The number inside a bracket follows that below it.
COUNT_UPDATED, COUNT_NONFINITE = tl.constexpr(0), tl.constexpr(1)
COUNT_BELOW = tl.constexpr(2)  # of the upper threshold
COUNT_KEPT = tl.constexpr(4)  # by the estimate
COUNT_INACTIVE = tl.constexpr(5)
COUNT_BELOW_LOWER = tl.constexpr(6)
