"""What the two processes of ``test_ddp.py`` run: functions of their rank, and of what a test gives."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import answer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rose_ops import RoseFusedAdamW, rose_accumulate, rose_backward, symmetric_kl
from rose_ops.definitions import unpack

RANKS = 2
FEATURES, HIDDEN, CLASSES, ROWS = 6, 24, 3, 32


def serve(rank: int, size: int, store: str, connection: Any) -> None:
    """Call the functions below by their names."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    answer(connection, lambda task: globals()[task[0]](rank, **task[1]))
    dist.destroy_process_group()


class RowDropout(nn.Module):
    """Dropout whose noise comes with the rows, another for each of two passes, so that a row sees the
    same in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        noise = noise.unflatten(1, (2, HIDDEN))[:, self.passes % 2]
        self.passes += 1
        return x * (noise > 0.3) / 0.7


class Classifier(nn.Module):
    def __init__(self, norm: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN) if norm else nn.Identity()
        self.dropout = RowDropout()
        self.middle = nn.Linear(HIDDEN, HIDDEN).to(dtype)
        self.last = nn.Linear(HIDDEN, CLASSES)
        self.sometimes = nn.Linear(HIDDEN, HIDDEN)
        self.never = nn.Parameter(torch.ones(3))
        self.uses = False

    def forward(self, rows: Tensor) -> Tensor:
        x, noise = rows.split((FEATURES, 2 * HIDDEN), 1)
        x = self.dropout(self.norm(self.first(x)).tanh(), noise)
        x = self.middle(x.to(self.middle.weight.dtype)).float().tanh()
        return self.last(self.sometimes(x).tanh() if self.uses else x)


def batch(seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A batch, or a rank's half of it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    rows = torch.cat([x, torch.rand(ROWS, 2 * HIDDEN, generator=generator)], 1)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    part = slice(None) if rank is None else slice(rank, None, RANKS)
    return rows[part], labels[part]


class Recorder(RoseFusedAdamW):
    """Notes masks, and which elements float rounding of the gradient could move across a threshold."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(
            model.parameters(), lr=1e-2, weight_decay=1e-2, upper=0.6, backend="reference", **options
        )
        self.forget()

    def forget(self) -> None:
        """As a copy has, too: no notes."""
        self.masks: dict[str, list[Tensor]] = {}
        self.near: dict[Tensor, Tensor] = {}
        self.gradients: list[Tensor | None] = []

    def capture(self, kind: str = "first", **options: Any) -> None:
        risks = self._risks(kind)
        super().capture(kind, **options)
        self.masks[kind] = [
            unpack(s[f"{kind}_mask"], p.numel()).view(p.shape) for p, s in self.state.items()
        ]
        self._note(kind, risks)

    def step(self, closure: Any = None) -> None:
        self.gradients = [
            None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]
        ]
        risks = self._risks("second") if "second" in self.settings.kinds else {}
        captured = "second" in self._captures.kinds
        super().step(closure)
        if risks and not captured and "second" in self.selection:  # else the step was skipped
            self._note("second", risks)

    def _risks(self, kind: str) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Risks, and what rounding makes of them: sums of a few dozen terms are exact to some units in
        the last place of the largest of them."""
        found = {}
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                g = p.grad.double().abs()
                error = 2e-6 * g.max()
                if kind == "second" and p in self.state:
                    m = self.state[p]["exp_avg"].double().abs()
                    g, error = (0.1 * g / m - 1).abs(), 0.1 * error / m
                found[p] = g, error + 1e-6 * g
        return found

    def _note(self, kind: str, risks: dict[Tensor, tuple[Tensor, Tensor]]) -> None:
        threshold = self.selection[kind].threshold.double()
        for p, (risk, error) in risks.items():
            near = (risk - threshold).abs() <= error
            self.near[p] = self.near.get(p, torch.zeros_like(near)) | near


def replicas(seed: int, options: dict, model: dict | None = None, **ddp: Any):
    torch.manual_seed(seed)
    module = Classifier(**(model or {}))
    wrapped = DistributedDataParallel(module, **ddp)
    return wrapped, Recorder(module, **options)


def train(
    rank: int,
    seed: int,
    order: str,
    r_drop: float,
    ddp: dict,
    model: dict | None = None,
    steps: int = 4,
    compiled: bool = False,
    unused: bool = False,
    twin: bool = False,
    scaled: bool = False,
    micro: tuple[int, ...] = (),
    every: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Several steps; all that must be alike on both ranks. With ``twin`` also how many elements
    differ from one process with the whole batch for no reason of rounding, in each step."""
    settings = {"order": order, "first_order_every": every}
    wrapped, optimizer = replicas(seed, settings, model, **ddp)
    module = wrapped.module
    called = torch.compile(wrapped, backend="eager") if compiled else wrapped
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
    notes: dict[str, Any] = {"steps": [], "alone": [], "near": []}
    for step in range(steps):
        module.uses = unused and rank == 1
        module_alone, alone = copy.deepcopy((module, optimizer))
        settings = {"r_drop": r_drop, "scaler": scaler, **options}
        optimizer.forget()
        own = batch(seed + step, rank)
        if micro:
            parts = list(zip(*(x.split(micro) for x in own), strict=True))
            losses = rose_accumulate(called, parts, optimizer, **settings)
        else:
            losses = rose_backward(called, *own, optimizer, **settings)
        finish(optimizer, scaler)
        if twin:
            alone.forget()
            expected = rose_backward(
                module_alone, *batch(seed + step), alone, **settings | {"scaler": None}
            )
            finish(alone, None)
            notes["alone"].append(differing(optimizer, alone))
            near = sum(int(x.sum()) for x in alone.near.values())
            notes["near"].append(near / sum(p.numel() for p in module.parameters()))
            if losses.grad_norm is not None:
                torch.testing.assert_close(losses.grad_norm, expected.grad_norm)
        optimizer.zero_grad()
        notes["steps"].append(
            {
                "gradients": optimizer.gradients,
                "masks": copy.deepcopy(optimizer.masks),
                "params": [p.detach().clone() for p in module.parameters()],
                "norm": losses.grad_norm,
            }
        )
    notes["flags"] = wrapped.require_backward_grad_sync, wrapped.require_forward_param_sync
    return notes


def finish(optimizer: RoseFusedAdamW, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def differing(one: Recorder, other: Recorder) -> int:
    """How many elements of masks and parameters differ for no reason of rounding."""
    count = 0
    groups = (optimizer.param_groups[0] for optimizer in (one, other))
    for p, q, g in zip(*(group["params"] for group in groups), other.gradients, strict=True):
        if g is None:
            count += int((p != q).sum())
            continue
        # A gradient as small as the rounding of its terms, against the root of its own square.
        state = other.state[q]
        root = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt() + 1e-8
        allowed = 1e-5 + 1e-2 * 2e-7 * g.abs().max() / root
        count += int((((p - q).abs() > allowed) & ~other.near[q]).sum())
    nears = [other.near.get(q) for q in other.state]
    for kind, masks in other.masks.items():
        for mask, theirs, near in zip(one.masks[kind], masks, nears, strict=True):
            count += int(((mask != theirs) & (True if near is None else ~near)).sum())
    return count


def buffers(rank: int, seed: int, order: str) -> list[tuple[list[Tensor], list[Tensor], bool]]:
    """Buffers after steps, and those of plain DDP after as many forwards."""
    wrapped, optimizer = replicas(seed, {"order": order}, {"norm": True})
    plain = DistributedDataParallel(copy.deepcopy(wrapped.module), find_unused_parameters=True)
    found = []
    for step in range(3):
        plain.module.load_state_dict(
            {**plain.module.state_dict(), **dict(wrapped.module.named_parameters())}
        )
        inputs, labels = batch(seed + step, rank)
        rose_backward(wrapped, inputs, labels, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(2):
            plain(inputs).sum().backward()
        found.append(
            (
                [x.clone() for x in wrapped.module.buffers()],
                [x.clone() for x in plain.module.buffers()],
                wrapped.require_forward_param_sync,
            )
        )
    return found


def refused(rank: int, seed: int, how: str, order: str, r_drop: float, **options: Any) -> str:
    """The message, once it is clear that nothing was changed."""
    ddp = {"static_graph": True} if how == "static graph" else {}
    wrapped, optimizer = replicas(seed, {"order": order}, **ddp)
    if how == "hook":
        wrapped.register_comm_hook(None, lambda state, bucket: None)
    elif how == "builtin hook":
        wrapped._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    context = {"join": wrapped.join, "no_sync": wrapped.no_sync}.get(how, torch.enable_grad)
    message = ""
    try:
        with context():
            try:
                rose_backward(wrapped, *batch(seed, rank), optimizer, r_drop=r_drop, **options)
            except ValueError as error:
                message = str(error)
    except RuntimeError:
        # join() expects forwards, and none was made.
        assert how == "join"
    assert wrapped.module.dropout.passes == 0
    assert not optimizer.state
    assert all(p.grad is None for p in wrapped.parameters())
    return message


def accumulation(rank: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two micro-batches with no_sync(), and those of one process with both."""
    wrapped, optimizer = replicas(seed, {"order": "second"}, find_unused_parameters=True)
    with wrapped.no_sync():
        rose_backward(wrapped, *batch(seed, rank), optimizer)
    wrapped.module.dropout.passes = 0
    rose_backward(wrapped, *batch(seed + 1, rank), optimizer)
    module = copy.deepcopy(wrapped.module)
    module.zero_grad()
    for step in range(2):
        module.dropout.passes = 0
        inputs, labels = batch(seed + step)
        F.cross_entropy(module(inputs), labels).backward()
    ours, alone = ([p.grad for p in m.parameters() if p.grad is not None] for m in (wrapped, module))
    return ours, alone


def ignored(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of a parameter that DDP averages and of one that it was told to leave alone."""
    torch.manual_seed(seed)
    module = Classifier()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["last.weight"])
    wrapped = DistributedDataParallel(module)
    rose_backward(wrapped, *batch(seed, rank), Recorder(module, order="first"))
    return module.first.weight.grad, module.last.weight.grad


def overflow(rank: int, seed: int, order: str) -> tuple[bool, float]:
    """Whether parameters are as they were after a step in which rank 1 saw an infinite gradient."""
    wrapped, optimizer = replicas(seed, {"order": order}, find_unused_parameters=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in wrapped.parameters()]

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) * (torch.inf if rank == 1 else 1.0)

    rose_backward(wrapped, *batch(seed, rank), optimizer, scaler=scaler, criterion=criterion)
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(p, b) for p, b in zip(wrapped.parameters(), before, strict=True))
    return same, scaler.get_scale()


class TrainingStep(nn.Module):
    """As Lightning has it: the step runs inside the forward of DDP, on the module that DDP wraps."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.classifier = Classifier()
        self.order = order

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.optimizer = Recorder(self.classifier, order=self.order)
        return rose_backward(self.classifier, inputs, labels, self.optimizer).loss


def inside_forward(rank: int, seed: int, order: str, sync: bool) -> list[Tensor | None] | str:
    """Gradients, or why there are none."""
    torch.manual_seed(seed)
    wrapped = DistributedDataParallel(TrainingStep(order))
    with nullcontext() if sync else wrapped.no_sync():
        try:
            wrapped(*batch(seed, rank))
        except ValueError as error:
            return str(error)
    return [p.grad for p in wrapped.parameters()]


def two_phases(rank: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the recipe for accumulation, under DDP as it is."""
    wrapped, optimizer = replicas(seed, {"order": "first"}, find_unused_parameters=True)
    micro_batches = [batch(seed + i, rank) for i in range(2)]
    for inputs, _ in micro_batches:
        (symmetric_kl(wrapped(inputs), wrapped(inputs)) / 2).backward()
    optimizer.capture("first")
    for inputs, labels in micro_batches:
        (F.cross_entropy(wrapped(inputs), labels) / 2).backward()
    optimizer.step()
    return optimizer.masks["first"], [p.detach() for p in wrapped.parameters()]
