"""A run of RoseTrainer in several processes, for test_trainer_fsdp2.py: with an order and "fsdp2" or
"ddp" on the command line, and the variables of torchrun, it prints what came out."""

from __future__ import annotations

import os
import sys
import tempfile

SPLITS = sys.argv[2] == "fsdp2"
os.environ.update(ACCELERATE_USE_CPU="true")
if SPLITS:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")

import torch  # noqa: E402
from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from test_trainer import arguments, classifier, sentences  # noqa: E402

from rose_ops import unwrap  # noqa: E402
from rose_ops.integrations.transformers import RoseTrainer  # noqa: E402

_init = PartialState.__init__


def _as_on_gpus(self: PartialState, *args: object, **options: object) -> None:
    """accelerate splits models on accelerators only; what it does then is the same on CPUs."""
    _init(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def main() -> None:
    options = {}
    if SPLITS:
        PartialState.__init__ = _as_on_gpus
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
        options = {"fsdp": True, "fsdp_config": config}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, ddp_backend="gloo", max_grad_norm=0.5, max_steps=4, **options)
        model = classifier()
        trainer = RoseTrainer(
            model=model, args=args, train_dataset=sentences(), rose={"order": sys.argv[1], "upper": 0.6}
        )
        trainer.train()
    optimizer = unwrap(trainer.optimizer)
    whole = [p.full_tensor() if SPLITS else p for p in trainer.model.parameters()]
    assert any(hasattr(p, "full_tensor") for p in optimizer.param_groups[0]["params"]) == SPLITS
    kind = "first" if sys.argv[1] == "first" else "second"
    _, kept, ranked, *_ = optimizer.selection[kind]
    total = sum(float(p.detach().double().abs().sum()) for p in whole)
    print(f"kept {int(kept)} of {int(ranked)}, norm {float(optimizer.grad_norm):.6f}, sum {total:.6f}")
    torch.distributed.destroy_process_group()


main()
