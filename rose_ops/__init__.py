"""ROSE, selective fine-tuning for robust language models, at the cost of AdamW."""

from rose_ops.accumulate import Accumulation, rose_accumulate
from rose_ops.divergence import symmetric_kl, token_kl
from rose_ops.flat import FlatParameter, flatten_parameters
from rose_ops.functional import (
    Selection,
    UpdateCounts,
    capture_mask,
    rose_adamw_,
    select_threshold,
)
from rose_ops.groups import rose_param_groups
from rose_ops.losses import RoseLosses, rose_backward
from rose_ops.optim import RoseFusedAdamW
from rose_ops.wrappers import unwrap

__version__ = "0.1.0"

__all__ = [
    "Accumulation",
    "FlatParameter",
    "RoseFusedAdamW",
    "RoseLosses",
    "Selection",
    "UpdateCounts",
    "capture_mask",
    "flatten_parameters",
    "rose_accumulate",
    "rose_adamw_",
    "rose_backward",
    "rose_param_groups",
    "select_threshold",
    "symmetric_kl",
    "token_kl",
    "unwrap",
]
