"""What is where in the memory that the host and kernels, or several of these, have in common.

A row describes a segment, which is one tensor, or those of one update that belong together. A record
is that of a selection (definitions.Field); of an update, two counts follow.
"""

from __future__ import annotations

import triton.language as tl

from rose_ops.definitions import Field, Hyper

# Operands of a segment. A ranking has GRAD and, of second order, MOMENT; an update has all.
PARAM, GRAD, MOMENT, SQUARE, OPERANDS = (tl.constexpr(i) for i in range(5))

# Columns of a row: int64.
N = tl.constexpr(0)  # elements
FIRST_TILE = tl.constexpr(1)  # of those of its class
FIRST_LINE = tl.constexpr(2)  # of those that can be sampled
OFFSET = tl.constexpr(3)  # global index of element 0
INDEX = tl.constexpr(4)  # in the lists of tensors
GROUP = tl.constexpr(5)
ALPHA = tl.constexpr(6)  # of second-order risks: float32(1 - beta1), as bits
SELECTIVE = tl.constexpr(7)  # in a ranking: 1
STEP = tl.constexpr(8)  # address
TO_DIMS = tl.constexpr(9)  # words from this row to the segment's dims
DATA = tl.constexpr(10)  # addresses of operands
MASKS = DATA + OPERANDS  # addresses; first and second order
MASK_KINDS = MASKS + 2
BITS = MASK_KINDS + 2  # address of the mask to write; or 0
COLUMNS = BITS + 1
DIM = OPERANDS + 1  # words of a dim: its size, and the strides of operands
MASK_OF_BITS, MASK_OF_ONE, MASK_OF_ALL = (tl.constexpr(i) for i in (1, 2, 3))  # 0: there is none

# Columns of the hyperparameters.
BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN = (tl.constexpr(int(h)) for h in [*Hyper][:5])
HYPER = tl.constexpr(len(Hyper))

# What the elements of a segment have in common in an update: 32-bit words, float32 but for the last
# two. BETA1, BETA2 and EPS come first; M, STEP_SIZE and DECAY have one for each kind of element.
C1, C2, INV_ROOT_BIAS2, SCALE, CLIP = (tl.constexpr(i) for i in range(3, 8))
M, STEP_SIZE, DECAY = (tl.constexpr(i) for i in (8, 12, 16))
RANDOM_KEY = tl.constexpr(20)
BASE_KIND = tl.constexpr(21)  # what masks add to; -1: nothing of the segment is selected
PREPARED = tl.constexpr(22)

# A record.
HIGH, LOW, KEPT, RANKED, INACTIVE, NONFINITE, MISSES, FIELDS = (tl.constexpr(int(f)) for f in Field)
UPDATED = FIELDS
UPDATE_NONFINITE = FIELDS + 1
RECORD = FIELDS + 2

BINS = tl.constexpr(256)
ROUNDS = tl.constexpr(4)  # of 8 bits each, but 7 in the last
WINDOW_BINS = tl.constexpr(2048)
SLOTS = tl.constexpr(64)  # copies of the counters: atomics on one word would queue

# The state, all of which starts as zeros. Of two thresholds, the upper one comes first.
COURSE = tl.constexpr(0)
EXACT, SPECULATIVE, APPROX = (tl.constexpr(i) for i in range(3))  # see bracket.py
LOGGED = tl.constexpr(1)  # entries of the log, or more than there is room for
SAMPLED = tl.constexpr(2)  # elements that are ranked
BRACKET_TICKET = tl.constexpr(3)
TICKETS = tl.constexpr(4)  # of each round
ESTIMATE = TICKETS + ROUNDS  # a record
TARGETS = ESTIMATE + RECORD
TARGET = tl.constexpr(16)
COUNTS = TARGETS + 2 * TARGET  # of the pass: COUNTERS in each slot
COUNTERS = tl.constexpr(8)
HISTOGRAMS = COUNTS + SLOTS * COUNTERS  # BINS of each threshold
WINDOWS = HISTOGRAMS + 2 * BINS  # WINDOW_BINS of the sample for each threshold
STATE = WINDOWS + 2 * WINDOW_BINS

# A target is a threshold on its way: the RANK-th smallest (0: it is not looked for) of the keys that
# are searched; of these, BELOW are less than those with the bits of PREFIX, and INSIDE have them.
RANK, BELOW, PREFIX, INSIDE = (tl.constexpr(i) for i in range(4))
BRACKET_LOW, BRACKET_END = tl.constexpr(4), tl.constexpr(5)  # both 0: there is none
COLLAPSED = tl.constexpr(6)  # the bracket is one key, that of a class of ties, which is not logged
WINDOW_LOW, WINDOW_HIGH, PIVOT = (tl.constexpr(i) for i in (7, 8, 9))
# Of the sample: keys below the window, at or below the pivot, and at it.
BELOW_WINDOW, UPTO_PIVOT, AT_PIVOT = (tl.constexpr(i) for i in (10, 11, 12))
# Sums of products of the differences between neighbouring lines, of their elements that are ranked (r)
# and of those that are at or below the pivot (c), too.
CC, CR, RR = (tl.constexpr(i) for i in (13, 14, 15))

# Counters of the pass. The last two are of the upper threshold's bracket, and again of the lower one's.
COUNT_UPDATED, COUNT_NONFINITE, COUNT_KEPT, COUNT_INACTIVE = (tl.constexpr(i) for i in range(4))
COUNT_BELOW, COUNT_INSIDE = tl.constexpr(4), tl.constexpr(5)
