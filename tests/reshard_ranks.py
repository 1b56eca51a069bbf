"""What the processes of ``test_reshard.py`` run: a training run from given gradients, which is saved by
some number of processes and resumed by another.

Gradients are those of a step's number, whole, and each process takes its part of them: what is trained
must not depend on how many there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forked import answer
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rose_ops import RoseFusedAdamW

RANKS = 3
SECONDS = 60  # for one task; they take a second or two


def serve(rank: int, _size: int, _store: str, connection: Any) -> None:
    """Call the functions below by their names, in a world of the size that each call wants. (A world
    of its own for each takes some milliseconds.)"""
    torch.set_num_threads(1)

    def call(task: tuple[str, int, str, dict[str, Any]]) -> Any:
        name, size, store, arguments = task
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
            timeout=timedelta(seconds=SECONDS),
        )  # fmt: skip
        try:
            return globals()[name](**arguments)
        finally:
            dist.destroy_process_group()

    answer(connection, call)


def columns(param: Tensor) -> Shard | None:
    return Shard(1) if param.dim() == 2 and param.shape[1] > 1 else None


class Run:
    """A model and its optimizer.

    Args:
        sharded: by FSDP2, over all processes.
        kind: of the model: ``"odd"`` (parts of different sizes, and empty ones), ``"columns"`` (whose
            matrices are split by columns) or ``"large"``.
        plain: ``torch.optim.AdamW``.
        options: of the optimizer.
    """

    def __init__(
        self, seed: int, sharded: bool, kind: str = "odd", plain: bool = False, **options: Any
    ) -> None:
        torch.manual_seed(seed)
        sizes = {"odd": (7, 33, 1), "columns": (6, 12, 6), "large": (8, 1 << 17, 3)}[kind]
        self.model = nn.Sequential(
            nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]), nn.Linear(1, 1)
        ).to(options.pop("dtype", torch.float32))
        if sharded:
            fully_shard(
                self.model,
                mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
                shard_placement_fn=columns if kind == "columns" else None,
            )
        params = [*self.model.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        if plain:
            self.optimizer: Any = torch.optim.AdamW(groups, lr=1e-2, weight_decay=1e-2)
        else:
            self.optimizer = RoseFusedAdamW(groups, lr=1e-2, **options)

    def give(self, step: int) -> None:
        """Gradients."""
        generator = torch.Generator().manual_seed(step)
        for p in self.model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            grad.masked_fill_(grad.abs() < 0.1, 0.0)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad

    def capture(self, step: int, kinds: Sequence[str] | None = None) -> None:
        """Masks for a step: all that the order has."""
        for kind in self.optimizer.settings.kinds if kinds is None else kinds:
            self.give({"first": 10_000, "second": 20_000}[kind] + step)
            self.optimizer.capture(kind)

    def train(self, begin: int, end: int, captured: bool = False) -> None:
        """Steps, of which the first has its masks already if ``captured``."""
        for step in range(begin, end):
            needed = getattr(self.optimizer, "needs_first_mask", False)
            if needed and not (captured and step == begin):
                self.capture(step, ["first"])
            self.give(step)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        """Parameters and moments, of all processes together."""
        found = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state[p]
            for key in ("", "step", "exp_avg", "exp_avg_sq"):
                value = state[key] if key else p.detach()
                found[name + key] = whole(value)
        return found


def whole(tensor: Tensor) -> Tensor:
    """A copy, of the parts of all processes."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


# -------------------------------------------------------------------------------- ways to save and load


def options_of(way: str) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict=way == "flattened",
        full_state_dict=way == "full",
        cpu_offload=way == "full",
    )


def save(run: Run, way: str, folder: str) -> None:
    """Ways: ``"by name"`` and ``"flattened"``, of PyTorch's get_state_dict, by
    torch.distributed.checkpoint; ``"by number"``: the optimizer's own state dict, likewise; ``"full"``:
    all of it in one file of torch.save, by name."""
    if way == "by number":
        dcp.save(
            {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()},
            checkpoint_id=folder,
        )
        return
    model, optimizer = states.get_state_dict(run.model, run.optimizer, options=options_of(way))
    saved = {"model": model, "optimizer": optimizer}
    if way != "full":
        dcp.save(saved, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        Path(folder).mkdir()
        torch.save(saved, Path(folder) / "whole.pt")


def load(run: Run, way: str, folder: str, masks: bool) -> None:
    """As :func:`save` has saved it. What torch.distributed.checkpoint loads it has to find in the state
    before: there, with ``masks``, some."""
    if way == "by number":
        make_state(run)
        if masks:
            run.capture(0)
        saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        dcp.load(saved, checkpoint_id=folder)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        return
    options = options_of(way)
    if way == "full":
        saved = torch.load(Path(folder) / "whole.pt", weights_only=True)
    else:
        model, optimizer = states.get_state_dict(run.model, run.optimizer, options=options)
        saved = {"model": model, "optimizer": optimizer}
        dcp.load(saved, checkpoint_id=folder)
    states.set_state_dict(
        run.model, run.optimizer, model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"], options=options,
    )  # fmt: skip


def make_state(run: Run) -> None:
    """To load into, as PyTorch's get_state_dict makes it."""
    rates = [group["lr"] for group in run.optimizer.param_groups]
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    run.optimizer.zero_grad()
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ----------------------------------------------------------------------------------------------- tasks


def leg(
    sharded: bool,
    steps: tuple[int, int],
    way: str,
    folder: str,
    seed: int = 1,
    source: str | None = None,
    masks: bool = False,
    plain: bool = False,
    **options: Any,
) -> dict[str, dict[str, Tensor]]:
    """A part of a run: from a checkpoint (or the beginning) to another one.

    Args:
        sharded, seed, plain, options: as in :class:`Run`.
        steps: the first, and the one after the last.
        masks: whether checkpoints have those of the step to come.

    Returns:
        What was loaded, and trained from that.
    """
    run = Run(seed, sharded, plain=plain, **options)
    loaded = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if source is not None:
            load(run, way, source, masks)
            loaded = run.whole()
        run.train(*steps, captured=masks and source is not None)
        if masks:
            run.capture(steps[1])
        save(run, way, folder)
    return {"loaded": loaded, "trained": run.whole()}


def from_one_process(
    path: str, kind: str, steps: tuple[int, int], **options: Any
) -> dict[str, dict[str, Tensor]]:
    """What a file that one process has saved becomes."""
    run = Run(2, True, kind, **options)
    saved = torch.load(path, weights_only=True)
    states.set_model_state_dict(
        run.model, saved["model"], options=StateDictOptions(full_state_dict=True)
    )
    run.optimizer.load_state_dict(saved["optimizer"])
    loaded = run.whole()
    run.train(*steps, captured=True)
    return {"loaded": loaded, "trained": run.whole()}


def files_of_each_rank(folder: str) -> dict[str, dict[str, Tensor]]:
    """A run that goes on from what torch.save and safetensors have kept of this rank's part."""
    from safetensors.torch import load_file, save_file

    run = Run(1, True, order="ensemble")
    run.train(0, 2)
    run.capture(2)
    own = Path(folder) / f"rank{dist.get_rank()}"
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], own.with_suffix(".pt"))
    saved = run.optimizer.state_dict()
    tensors = {
        f"{i}.{key}": (value.to_local() if isinstance(value, DTensor) else value).contiguous()
        for i, state in saved["state"].items()
        for key, value in state.items()
    }
    save_file(tensors, own.with_suffix(".safetensors"))
    weights, of_torch = torch.load(own.with_suffix(".pt"), weights_only=True)
    flat = load_file(own.with_suffix(".safetensors"))
    of_safetensors = {
        **saved,
        "state": {
            i: {
                key: DTensor.from_local(
                    flat[f"{i}.{key}"], value.device_mesh, value.placements,
                    shape=value.shape, stride=value.stride(),
                )
                if isinstance(value, DTensor)
                else flat[f"{i}.{key}"]
                for key, value in state.items()
            }
            for i, state in saved["state"].items()
        },
    }  # fmt: skip
    found = {}
    for way, state in (("torch", of_torch), ("safetensors", of_safetensors)):
        run = Run(2, True, order="ensemble")
        run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(state)
        run.train(2, 4, captured=True)
        found[way] = run.whole()
    return found


def other_placements() -> dict[str, Any]:
    """What is said of state that does not fit, and whether all is as it was."""
    run = Run(1, True, order="first")
    run.train(0, 2)
    run.capture(2)
    before = run.whole()
    saved = run.optimizer.state_dict()
    own = saved["state"][0]
    first = own["first_mask"]
    broken = {
        "exp_avg": {"exp_avg": own["exp_avg"].redistribute(placements=[Replicate()])},
        "first_mask": {"first_mask": first.redistribute(placements=[Replicate()])},
        "another shape": {"first_mask": torch.ones(first.numel(), dtype=torch.bool)},
        "packed, too short": {"first_mask": torch.zeros(first.numel() // 8, dtype=torch.uint8)},
    }
    found: dict[str, Any] = {}
    for name, change in broken.items():
        state = {**saved["state"], 0: {**own, **change}}
        try:
            run.optimizer.load_state_dict({**saved, "state": state})
        except ValueError as error:
            found[name] = str(error)
    after = run.whole()
    found["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
    return found
