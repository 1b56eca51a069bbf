"""What the processes of ``test_distributed.py`` run: functions of their rank, the number of ranks, and
of what a test gives."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import answer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rose_ops import RoseFusedAdamW, rose_backward, unwrap
from rose_ops.ranks import Ranks

# Of parameters: fewer rows than ranks, not divisible by them, no dimension at all, nothing in it.
SHAPES = ((33, 17), (2, 40), (5,), (), (7, 4, 3), (64, 16), (0, 3), (1,))


def serve(rank: int, size: int, store: str, connection: Any) -> None:
    """Call the functions below by their names."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    answer(connection, lambda task: globals()[task[0]](rank, size, **task[1]))


# ------------------------------------------------------------------------------------- placements


@cache
def mesh_of(*shape: int) -> Any:
    """Made once: its groups take their time."""
    names = ("outer", "inner") if len(shape) == 2 else None
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def placed(layout: str, rank: int, size: int) -> Any:
    """A function that takes what a parameter's whole is to what this rank has of it (None: nothing)."""
    if layout == "whole":
        return lambda _, whole: whole
    if layout == "dealt":  # whole tensors, as ZeRO-1 has them
        return lambda i, whole: whole if i % size == rank else None
    if layout == "cut":  # plain parts of one flat tensor, some of which are empty
        return lambda _, whole: (
            whole.reshape(-1).tensor_split(size)[rank] if rank < whole.numel() else None
        )

    def spread(mesh: Any, *placements: Any) -> Any:
        def place(i: int, whole: Tensor) -> Tensor:
            fitting = [
                p if not isinstance(p, Shard) or whole.dim() > p.dim else Replicate()
                for p in placements
            ]
            # Without src_data_rank: every rank has the whole already.
            return distribute_tensor(whole, mesh, fitting, src_data_rank=None)

        return place

    line = mesh_of(size)
    if layout == "rows":  # FSDP2
        return spread(line, Shard(0))
    if layout == "columns":
        return spread(line, Shard(1))
    if layout == "copies":
        return spread(line, Replicate())
    if layout == "beside":  # some parameters are plain, and the same everywhere
        place = spread(line, Shard(0))
        return lambda i, whole: place(i, whole) if i % 3 else whole
    grid = mesh_of(2, size // 2)
    if layout == "hybrid":  # HSDP
        return spread(grid, Replicate(), Shard(0))
    if layout == "grid":
        return spread(grid, Shard(0), Shard(1))
    if layout == "nested":
        return spread(grid, Shard(0), Shard(0))
    if layout == "meshes":  # some parameters on one dimension of the mesh, copied along the other
        whole_grid, inner = spread(grid, Shard(1), Shard(0)), spread(grid["inner"], Shard(0))
        return lambda i, whole: (whole_grid if i % 2 else inner)(i, whole)
    raise ValueError(layout)


def whole_of(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------ training


def values(seed: int, shapes: Any, scale: float, hostile: bool | str) -> list[Tensor]:
    """Seeded: the same on every rank. Hostile: zeros, ties, denormals, and what is not finite; "tied":
    two in three have the same magnitude; "largest": half are the largest number."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator) * scale
        if hostile == "largest":
            x = x.where(x < 0, torch.finfo(torch.float32).max)
        elif hostile == "tied":
            x = x.sign() * x.abs().clamp(min=scale)
        elif hostile:
            kind = torch.rand(shape, generator=generator)
            x = x.where(kind > 0.15, 0.0).where(kind < 0.95, 0.25)
            x = (x * 1e-40).where((kind > 0.3) & (kind < 0.32), x)
            x = x.where((kind < 0.5) | (kind > 0.502), torch.nan).where(
                (kind < 0.6) | (kind > 0.602), -torch.inf
            )
        found.append(x)
    return found


def options_of(layout: str, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, **({"process_group": dist.group.WORLD} if layout in ("dealt", "cut") else {})}


class Training:
    """One rank's parameters and optimizer, and gradients that are given.

    Args:
        plain: parameters that are not selective.
        without: parameters that have no gradient in the second step.
        kept: parameters that ever have one; None: all.
    """

    def __init__(
        self, rank: int, size: int, layout: str, data_seed: int, shapes: Any = SHAPES,
        hostile: bool | str = True, dtype: torch.dtype = torch.float32, plain: tuple[int, ...] = (),
        without: tuple[int, ...] = (), kept: Sequence[int] | None = None,
        lr: float = 1e-2, **options: Any,
    ) -> None:  # fmt: skip
        self.seed, self.shapes, self.hostile, self.dtype = data_seed, shapes, hostile, dtype
        self.without, self.kept = without, range(len(shapes)) if kept is None else kept
        self.place = placed(layout, rank, size)
        self.params: dict[int, nn.Parameter] = {}
        for i, whole in enumerate(values(data_seed, shapes, 1.0, False)):
            part = self.place(i, whole.to(dtype))
            if part is not None:
                self.params[i] = nn.Parameter(part.clone())
        of_kind: tuple[list[Tensor], list[Tensor]] = [], []
        for i, p in self.params.items():
            of_kind[i in plain].append(p)
        groups = [
            {"params": of_kind[0]},
            {"params": of_kind[1], "selective": False, "betas": (0.8, 0.98)},
        ]
        self.optimizer = RoseFusedAdamW(groups, lr=lr, **options_of(layout, options))

    def give(self, step: int, kind: int, scale: float = 1.0) -> None:
        """Gradients of a step; of two kinds."""
        wholes = values(self.seed + 1000 * step + kind, self.shapes, 0.1, self.hostile)
        for i, p in self.params.items():
            absent = (step == 1 and i in self.without) or i not in self.kept
            p.grad = None if absent else self.place(i, (wholes[i] * scale).to(self.dtype))

    def step(self, step: int, scale: float = 1.0) -> None:
        if "first" in self.optimizer.settings.kinds:
            self.give(step, 1)
            self.optimizer.capture("first")
        self.give(step, 2, scale)
        self.optimizer.step()

    def result(self) -> dict[str, Any]:
        """Of parameters that have a state: whole tensors, where this rank can tell; and numbers."""
        states = {i: self.optimizer.state[p] for i, p in self.params.items() if self.optimizer.state[p]}
        tensors = {
            key: [whole_of(x[key]) for x in states.values()] for key in ("exp_avg", "exp_avg_sq")
        }
        selection = self.optimizer.selection.items()
        norm = self.optimizer.grad_norm
        return {
            "mine": list(states),
            "tensors": {"param": [whole_of(self.params[i].detach()) for i in states], **tensors},
            "selection": {k: [x.item() for x in found] for k, found in selection if k != "update"},
            "norm": None if norm is None else norm.item(),
        }


def train(rank: int, size: int, *, steps: int = 3, **arguments: Any) -> dict[str, Any]:
    training = Training(rank, size, **arguments)
    for step in range(steps):
        training.step(step)
    return training.result()


@contextmanager
def of_any_size() -> Iterator[None]:
    """In the block, few elements are ranked as many are: in one pass."""
    fewest, Ranks.fewest = Ranks.fewest, 0
    try:
        yield
    finally:
        Ranks.fewest = fewest


def train_in_one_pass(
    rank: int, size: int, *, steps: int = 4, jump: int = -1, forgets: int = -1, **arguments: Any
) -> dict[str, Any]:
    """Like :func:`train`, with what became of the latest bracket of each step.

    Args:
        jump: a step whose gradients are a thousand times larger, and with them the threshold.
        forgets: a rank that does not know the threshold of the step before the last one.
    """
    training, reports = Training(rank, size, **arguments), []
    with of_any_size():
        for step in range(steps):
            if rank == forgets and step == steps - 1:
                training.optimizer._engine.ranks.latest.clear()
            training.step(step, 1e3 if step == jump else 1.0)
            reports.append(torch.ops.rose_ops.latest_bracket_report().tolist())
    return {**training.result(), "reports": reports}


def lost_on_the_way(rank: int, size: int, *, at: int, **arguments: Any) -> dict[str, Any]:
    """All ranks learn at a sum of the third step that one is lost."""
    training, add = Training(rank, size, **arguments), Ranks.add_
    calls = 0

    def add_(self: Ranks, state: Tensor) -> None:
        nonlocal calls
        add(self, state)
        if calls == at:
            raise ConnectionError("lost")
        calls += 1

    with of_any_size():
        for step in range(2):
            training.step(step)
        before = snapshot(training)
        (p,) = training.params.values()
        version = p._version
        Ranks.add_ = add_
        try:
            with pytest.raises(ConnectionError, match="lost"):
                training.step(2)
        finally:
            Ranks.add_ = add
    return {
        "before": before,
        "after": snapshot(training),
        "grad": p.grad,
        "steps": training.optimizer._steps_done,
        "versions": p._version - version,
        "is_let_go": training.optimizer._engine.ranks._failure is None,
    }


def count(rank: int, size: int, *, n: int, **arguments: Any) -> tuple[list[int], list[int]]:
    """How many sums a step takes, and their bytes, as torch.distributed sees them."""
    training = Training(rank, size, shapes=((n,),), hostile=False, **arguments)
    for step in range(3):  # the first one that ranks knows of no threshold to look around
        training.step(step)
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    before = training.optimizer._engine.ranks.sums
    try:
        training.step(3)
    finally:
        dist.all_reduce = all_reduce
    assert training.optimizer._engine.ranks.sums == before + len(calls)
    return calls


def stagger(rank: int, size: int, *, steps: int, **arguments: Any) -> list[int]:
    """Ranks wait at random; what identifies parameters and moments after each step."""
    training, waits, digests = Training(rank, size, **arguments), random.Random(rank), []
    for step in range(steps):
        if waits.random() < 0.3:
            time.sleep(waits.random() * 0.01)
        training.step(step)
        # Parameters that a mask leaves alone stay bit for bit, so these tell masks apart.
        found = training.result()["tensors"]
        words = [t.view(torch.int32).long().sum().item() for kind in found.values() for t in kind]
        digests.append(hash(tuple(words)))
    return digests


def scale(rank: int, size: int, *, overflow_on: int, **arguments: Any) -> dict[str, Any]:
    """A loss scale, and an overflow that one rank alone has seen, in the second of three steps."""
    training = Training(rank, size, hostile=False, **arguments)
    for step in range(3):
        training.optimizer.grad_scale = torch.tensor(8.0)
        training.optimizer.found_inf = torch.tensor(float(step == 1 and rank == overflow_on))
        training.step(step, 8.0)
        del training.optimizer.grad_scale, training.optimizer.found_inf
    return training.result()


# ----------------------------------------------------------------------------------------- faults


def snapshot(training: Training) -> list[Tensor]:
    tensors = [p.detach() for p in training.params.values()]
    tensors += [x for state in training.optimizer.state.values() for x in state.values()]
    return [t.to_local().clone() if isinstance(t, DTensor) else t.clone() for t in tensors]


def message(training: Training, step: int) -> str:
    """Of the error of a step that must change nothing."""
    before = snapshot(training)
    try:
        training.step(step)
    except RuntimeError as error:
        after = snapshot(training)
        assert len(after) == len(before), "state was made"
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "something changed"
        return str(error)
    return "no error"


def made_differently(rank: int, size: int, *, of_rank: dict[str, Any], **arguments: Any) -> str:
    options = {**arguments, **(of_rank if rank == size - 1 else {})}
    return message(Training(rank, size, **options), 0)


def at_another_place(rank: int, size: int, *, what: str, **arguments: Any) -> str:
    training = Training(rank, size, **arguments)
    training.step(0)
    if rank == size - 1:
        if what == "hyperparameters":
            training.optimizer.param_groups[0]["betas"] = (0.7, 0.999)
        elif what == "steps":
            training.optimizer._steps_done += 1
        elif what == "optimizers":  # another one is next here
            training.optimizer._engine.ranks._number += 1
        elif what == "captures":  # as after loading a state that has a mask, on one rank
            training.optimizer._captures.kinds.add("second")
        elif what == "order":  # of captures
            training.give(1, 2)
            try:
                training.optimizer.capture("second")
            except RuntimeError as error:
                return str(error)
    return message(training, 1)


def dies(rank: int, size: int, *, how: str, **arguments: Any) -> tuple[str, float]:
    """The last rank does not come to the second step."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    training = Training(rank, size, **arguments)
    training.step(0)
    if rank == size - 1:
        if how == "exits":
            os._exit(1)
        time.sleep(8)
        return "", 0.0
    begin = time.perf_counter()
    return message(training, 1), time.perf_counter() - begin


def nothing_here(rank: int, size: int, **arguments: Any) -> dict[str, Any]:
    """The last rank has no gradients."""
    kept = () if rank == size - 1 else None
    return train(rank, size, hostile=False, kept=kept, **arguments)


def own_masks(rank: int, size: int, *, limit: bool) -> int:
    """Masks of one's own, and a last rank without gradients."""
    torch.manual_seed(rank)
    p = nn.Parameter(torch.randn(64))
    optimizer = RoseFusedAdamW([p], process_group=dist.group.WORLD)
    for step in range(3):
        optimizer.set_masks({p: torch.arange(64) < 32}, kind="second", limit=limit)
        p.grad = None if rank == size - 1 and step == 1 else torch.randn(64)
        optimizer.step()
    return optimizer._steps_done


def refused(rank: int, size: int) -> None:
    world, mesh = dist.group.WORLD, mesh_of(size)
    one, part = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(2, 2))
    spread = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))
    partial = DTensor.from_local(torch.ones(6, 2), mesh, [Partial()])

    def says(pattern: str, error: type[Exception], params: list[Any], **options: Any) -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(error, match=pattern):
            RoseFusedAdamW(params, **options).step()
        assert one.equal(torch.ones(6, 2))

    says("expected None or a group", TypeError, [one], process_group="world")
    says("expected one of them", ValueError, [one], process_group=world, local_ranking=True)
    says("norms of whole tensors cannot", NotImplementedError, [part], process_group=world,
         granularity="tensor")  # fmt: skip
    says("may be copies or parts", ValueError, [one, spread], process_group=world)
    says("sums that are not taken yet", ValueError, [nn.Parameter(partial)])
    with pytest.raises(TypeError, match=r"state_dict\(\) instead"):
        copy.deepcopy(RoseFusedAdamW([part], process_group=world))

    # Gradients and state that are placed otherwise.
    optimizer = RoseFusedAdamW([spread])
    spread.grad = distribute_tensor(torch.ones(6, 2), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="is placed as"):
        optimizer.step()
    assert not optimizer.state
    spread.grad = torch.ones_like(spread)
    optimizer.step()
    optimizer.state[spread]["exp_avg"] = torch.zeros(6, 2)
    with pytest.raises(RuntimeError, match="is a plain tensor, and the parameter a DTensor"):
        optimizer.step()

    # A mesh that has not every process in it: it is not clear what the others have.
    pair = init_device_mesh("cpu", (size - 1,)) if rank < size - 1 else None
    dist.barrier()
    if pair is not None:
        fewer = nn.Parameter(distribute_tensor(torch.ones(6, 2), pair, [Shard(0)], src_data_rank=None))
        says("of 2 of the 3 processes", RuntimeError, [fewer])
        fewer.grad = torch.ones_like(fewer)
        RoseFusedAdamW([fewer], process_group=pair.get_group()).step()


STAGES = (((33, 17), (5,)), ((12, 16), (3, 3, 4), (7,)))


def stages(rank: int, size: int, *, data_seed: int, **options: Any) -> dict[str, Any]:
    """Two stages of a pipeline, each with shards on two ranks."""
    stage = rank // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))["shard"]
    every = [shape for shapes in STAGES for shape in shapes]
    mine = range(len(STAGES[0])) if stage == 0 else range(len(STAGES[0]), len(every))

    def part(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    training = Training.__new__(Training)
    training.seed, training.shapes, training.hostile = data_seed, every, False
    training.dtype, training.without, training.kept = torch.float32, (), range(len(every))
    training.place = lambda _, whole: part(whole)
    wholes = values(data_seed, every, 1.0, False)
    training.params = {i: nn.Parameter(part(wholes[i])) for i in mine}
    params = [*training.params.values()]
    training.optimizer = RoseFusedAdamW(params, lr=1e-2, process_group=dist.group.WORLD, **options)
    for step in range(3):
        training.step(step)
    result = training.result()
    result["mine"] = [i - mine[0] for i in result["mine"]]
    return result


def oddities(rank: int, size: int, *, data_seed: int) -> list[int]:
    """Few selective elements beside many that are not, and one that is frozen and nowhere."""
    generator = torch.Generator().manual_seed(data_seed + rank)
    frozen = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    many = nn.Parameter(torch.randn(1 << 20, generator=generator))
    few = nn.Parameter(torch.randn(8, generator=generator))
    groups = [{"params": [frozen, few]}, {"params": [many], "selective": False}]
    if rank == 1:  # and another learning rate, as another stage may have
        groups[1]["weight_decay"] = 0.5
    optimizer = RoseFusedAdamW(
        groups, process_group=dist.group.WORLD, selection="approx", max_grad_norm=1.0
    )
    for _ in range(3):
        many.grad = torch.randn(many.shape, generator=generator)
        few.grad = torch.randn(few.shape, generator=generator)
        optimizer.step()
    return [int(optimizer.selection["second"].ranked), int(optimizer.selection["second"].kept)]


def resumed(rank: int, size: int, *, data_seed: int) -> int:
    """Only the first rank's parameters have been trained so far."""
    generator = torch.Generator().manual_seed(data_seed + rank)
    p = nn.Parameter(torch.randn(8, generator=generator))

    def make() -> RoseFusedAdamW:
        return RoseFusedAdamW([p], process_group=dist.group.WORLD)

    optimizer = make()
    for _ in range(3):
        p.grad = torch.randn(8, generator=generator) if rank == 0 else None
        optimizer.step()
    again = make()
    again.load_state_dict(optimizer.state_dict())
    p.grad = torch.randn(8, generator=generator)
    again.step()
    return again._steps_done


def without_mask(rank: int, size: int, *, data_seed: int) -> str:
    generator = torch.Generator().manual_seed(data_seed + rank)
    p = nn.Parameter(torch.randn(8, generator=generator))
    optimizer = RoseFusedAdamW([p], lr=0.0, order="first", process_group=dist.group.WORLD)
    p.grad = torch.randn(8, generator=generator) * (rank == 0)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert not optimizer.state
        return str(error)
    return "no error"


def replicas(rank: int, size: int) -> str:
    p = nn.Parameter(torch.arange(6.0))
    p.grad = torch.ones(6)
    try:
        RoseFusedAdamW([p], process_group=dist.group.WORLD).step()
    except RuntimeError as error:
        return str(error)
    return "no error"


# ---------------------------------------------------------------------------------------- engines


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Dropout(0.1), nn.Linear(33, 5))


def engine(rank: int, size: int, *, kind: str, data_seed: int, **options: Any) -> dict[str, Any]:
    """Three steps by ``rose_backward`` of a model that an engine has split; and of the same under
    DistributedDataParallel, which has the whole on every rank."""
    model, twin = classifier(), DistributedDataParallel(classifier())
    params: Any = model.parameters()
    optimizers = []
    if kind.startswith("fsdp2"):
        late = RoseFusedAdamW(params, lr=1e-2, **options) if kind == "fsdp2-late" else None
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh_of(size))
        if late is not None:  # as accelerate does: the optimizer is made before, and gets the shards
            late.param_groups[0]["params"] = [*model.parameters()]
        optimizers.append(late or RoseFusedAdamW(model.parameters(), lr=1e-2, **options))
    elif kind == "zero":
        model = DistributedDataParallel(model)
        maker = partial(RoseFusedAdamW, process_group=dist.group.WORLD, **options)
        optimizers.append(ZeroRedundancyOptimizer(params, optimizer_class=maker, lr=1e-2))
    else:
        model = FullyShardedDataParallel(
            model, use_orig_params=kind == "fsdp1-original", device_id=torch.device("cpu")
        )
        group = dist.group.WORLD
        optimizers.append(RoseFusedAdamW(model.parameters(), lr=1e-2, process_group=group, **options))
    optimizers.append(RoseFusedAdamW(twin.parameters(), lr=1e-2, **options))
    generator = torch.Generator().manual_seed(data_seed + rank)
    for _ in range(3):
        x = torch.randn(8, 7, generator=generator)
        labels = torch.randint(5, (8,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        for module, optimizer in zip((model, twin), optimizers, strict=True):
            torch.manual_seed(seed)  # of dropout
            rose_backward(module, x, labels, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    split, whole = (unwrap(optimizer) for optimizer in optimizers)
    if kind.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model):
            found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    else:
        found = torch.cat([whole_of(p.detach()).reshape(-1) for p in model.parameters()])
    expected = torch.cat([p.detach().reshape(-1) for p in twin.parameters()])
    return {
        "found": found[: expected.numel()],  # FSDP1 pads
        "expected": expected,
        "selection": [x.item() for x in next(iter(split.selection.values()))],
        "of_twin": [x.item() for x in next(iter(whole.selection.values()))],
    }


def scaler(rank: int, size: int) -> tuple[float, float, int]:
    """FSDP2 under a GradScaler; one rank's loss overflows in the second step."""
    model = classifier()
    fully_shard(model, mesh=mesh_of(size))
    optimizer = RoseFusedAdamW(model.parameters(), lr=1e-2)
    scaling = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        loss = model(torch.ones(2, 7)).square().mean()
        overflow = step == 1 and rank == 0
        scaling.scale(loss * float("inf") if overflow else loss).backward()
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
    steps = {int(state["step"]) for state in optimizer.state.values()}
    return scaling.get_scale(), len(steps), steps.pop()
