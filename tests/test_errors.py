"""Bad input: the type of the error, a message that helps, and nothing changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_all_same_bits
from torch import Tensor, nn
from training import Snapshot, clones, each_granularity, each_order, give, gradients, parameters, train
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, backends, capture_mask, rose_adamw_, select_threshold


def one(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype, device=device))


# ---------------------------------------------------------------------------------------- arguments

NAN, INF = float("nan"), float("inf")
ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({"lr": x}, ValueError, r"^lr=.*; expected a number >= 0$")
        for x in (-1e-3, NAN, INF, "1", None, True)
    ),
    ({"lr": torch.tensor(-1.0)}, ValueError, r"^lr=tensor\(-1\.\) \(Tensor\); expected a number >= 0$"),
    (
        {"lr": torch.tensor([0.1, 0.2])},
        ValueError,
        r"^lr=.*expected a number or a tensor of one element$",
    ),
    (
        {"lr": torch.tensor(1j)},
        ValueError,
        r"^lr=.* \(Tensor\); expected a number or a tensor of one element$",
    ),
    *(
        ({"betas": x}, ValueError, r"^betas=.*; expected two numbers in \[0, 1\)$")
        for x in (
            (1.0, 0.9),
            (0.9, 1.0),
            (-0.1, 0.9),
            (0.9, NAN),
            (0.9, "0.9"),
            (torch.tensor(1.5), torch.tensor(0.9)),
            (torch.tensor([0.9, 0.9]), torch.tensor(0.9)),
        )
    ),
    *(
        ({"betas": x}, ValueError, r"^betas=.*; expected a pair of numbers$")
        for x in (0.9, None, (0.9,), (0.9, 0.9, 0.9), "ab")
    ),
    *(({"eps": x}, ValueError, r"^eps=.*; expected a number >= 0$") for x in (-1e-8, NAN, INF, None)),
    *(
        ({"weight_decay": x}, ValueError, r"^weight_decay=.*; expected a number >= 0$")
        for x in (-0.1, INF)
    ),
    *(
        ({"maximize": x}, ValueError, r"^maximize=.*; expected True or False$")
        for x in (1, None, "yes")
    ),
    ({"capturable": True}, ValueError, r"^capturable=True is for CUDA graphs; expected False"),
    ({"capturable": 1}, ValueError, r"^capturable=1 \(int\); expected True or False$"),
    (
        {"order": "third"},
        ValueError,
        r"^order='third' \(str\); expected one of 'first', 'second', 'ensemble'$",
    ),
    (
        {"order": None},
        ValueError,
        r"^order=None \(NoneType\); expected one of 'first', 'second', 'ensemble'$",
    ),
    (
        {"granularity": "row"},
        ValueError,
        r"^granularity='row' \(str\); expected one of 'element', 'tensor'$",
    ),
    (
        {"selection": "sampled"},
        ValueError,
        r"^selection='sampled' \(str\); expected one of 'exact', 'bracket'",
    ),
    ({"inactive": "keep"}, ValueError, r"^inactive='keep' \(str\); expected one of 'update', 'rank'$"),
    (
        {"backend": "avx"},
        ValueError,
        r"^backend='avx' \(str\); expected one of 'auto', 'cuda', 'triton', ",
    ),
    *(
        (
            {"upper": x},
            ValueError,
            rf"^upper={x} \({type(x).__name__}\); expected 0 < upper <= 1, the frac",
        )
        for x in (0, 0.0, -0.5, 1.5, 2)
    ),
    *(({"upper": x}, ValueError, r"^upper=.*; expected a finite number$") for x in (NAN, INF)),
    ({"upper": 1e-10}, ValueError, r"^upper=1e-10 \(float\); expected 0 < upper.* in units of 1e-9"),
    *(
        ({"upper": x}, TypeError, rf"^upper=.* \({type(x).__name__}\); expected a number$")
        for x in ("0.6", None, True, {}, torch.tensor(0.6))
    ),
    *(
        ({"upper": x}, ValueError, r"^upper=.*a pair \(first, second\)$")
        for x in ((0.5,), (0.5,) * 3, [])
    ),
    ({"upper": (0.5, 0)}, ValueError, r"^upper \(second\)=0 \(int\); expected 0 < upper <= 1"),
    ({"upper": (1.5, 0.5)}, ValueError, r"^upper \(first\)=1\.5 \(float\); expected 0 < upper <= 1"),
    *(
        (
            {"lower": x},
            ValueError,
            rf"^lower={x} \({type(x).__name__}\); expected 0 <= lower < upper \(0\.6\)$",
        )
        for x in (0.6, 0.7, 1, -0.1)
    ),
    (
        {"lower": (0.1, 0.7)},
        ValueError,
        r"^lower \(second\)=0\.7 \(float\); expected 0 <= lower < upper \(0\.6\)$",
    ),
    ({"lower": None}, TypeError, r"^lower=None \(NoneType\); expected a number$"),
    *(
        ({"gamma": x}, ValueError, r"^gamma=.*; expected 0 < gamma < 1, the first-order weight$")
        for x in (0, 1, -0.5, NAN, None, "0.5")
    ),
    *(
        (
            {"selection_warmup_steps": x},
            ValueError,
            r"^selection_warmup_steps=.*; expected an integer >= 0$",
        )
        for x in (-1, 1.0, None, True)
    ),
    *(
        ({"seed": x}, ValueError, r"^seed=.*; expected an integer >= 0 and < 4294967296$")
        for x in (-1, 2**32, 1.0, None)
    ),
    *(
        (
            {"state_dtype": x},
            ValueError,
            r"^state_dtype=.*; expected None \(float32\), torch\.float32 or",
        )
        for x in (torch.float16, torch.float64, "bfloat16")
    ),
    # What is not there yet says what to do instead.
    ({"max_grad_norm": 0}, ValueError, r"^max_grad_norm=0 \(int\); expected None .* or a number > 0"),
    ({"process_group": object()}, TypeError, r"^process_group=.*; expected None or a group of torch"),
    ({"backend": "cuda"}, ValueError, r"^backend='cuda' runs on cuda, and the parameters are on cpu"),
    ({"amsgrad": True}, ValueError, r"^amsgrad=True \(bool\) is not supported; expected False$"),
    ({"differentiable": True}, ValueError, r"^differentiable=True \(bool\) is not supported; expected"),
    ({"local_ranking": 1}, ValueError, r"^local_ranking=1 \(int\); expected True or False$"),
    ({"amp_scaling": None}, ValueError, r"^amp_scaling=None \(NoneType\); expected True or False$"),
]


def named(case: tuple[dict[str, Any], type[Exception], str]) -> str:
    """The same in every process: without addresses."""
    return re.sub(r" at 0x\w+", "", "-".join(f"{key}={value!r}" for key, value in case[0].items()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    ARGUMENTS,
    ids=[f"{i}-{named(c)}"[:60] for i, c in enumerate(ARGUMENTS)],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        RoseFusedAdamW([one()], **arguments)
    assert type(raised.value) is error


OF_GROUPS = ("lr", "betas", "eps", "weight_decay", "maximize", "capturable")
GROUP_OPTIONS = [case for case in ARGUMENTS if next(iter(case[0])) in OF_GROUPS]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *GROUP_OPTIONS,
        ({"selective": "all"}, ValueError, r"^selective='all' \(str\); expected True or False$"),
        ({"amsgrad": True}, ValueError, r"^amsgrad=True \(bool\) is not supported; expected False$"),
        ({"differentiable": True}, ValueError, r"^differentiable=True \(bool\) is not supported; exp"),
        ({"decoupled_weight_decay": False}, ValueError, r"^decoupled_weight_decay=False \(bool\) is"),
        *(
            ({name: value}, ValueError, rf"^'{name}' in a parameter group: one ranking spans")
            for name, value in {
                "order": "first", "upper": 0.5, "lower": 0.1, "gamma": 0.3, "granularity": "tensor",
                "selection": "exact", "inactive": "rank", "selection_warmup_steps": 3,
                "max_grad_norm": 1.0, "state_dtype": None, "backend": "cpu", "process_group": None,
                "seed": 1,
            }.items()
        ),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)  # fmt: skip
def test_options_of_a_group_added_later(arguments, error, message, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first")
    train(optimizer, params, 2, generator)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [one()], **arguments})
    snapshot.assert_unchanged()


def test_groups_may_say_what_adamw_s_say():
    """Where it is what happens here anyway: groups of other programs carry these."""
    optimizer = RoseFusedAdamW(
        [
            {
                "params": [one()], "amsgrad": False, "foreach": None, "fused": True, "name": "head",
                "differentiable": False, "decoupled_weight_decay": True, "initial_lr": 0.1,
            }
        ]
    )  # fmt: skip
    assert optimizer.param_groups[0]["name"] == "head"


# --------------------------------------------------------------------------------------- parameters

PARAMETERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: [], ValueError, "empty parameter list"),
    "a tensor": (one, TypeError, "should be an iterable of Tensors or dicts"),
    "no tensor": (
        lambda: ["weight"],
        TypeError,
        "can only optimize Tensors, but one of the params is str",
    ),
    "a set in a group": (lambda: [{"params": {one()}}], TypeError, "organized in ordered collections"),
    "not a leaf": (lambda: [one() * 2], ValueError, "can't optimize a non-leaf Tensor"),
    "group without params": (lambda: [{"lr": 0.1}], KeyError, "params"),
    "twice in a group": (lambda: [one()] * 2, ValueError, "more than once in a group; expected once"),
    "float64": (
        lambda: [one(torch.float64)],
        TypeError,
        r"torch\.float64 are not supported; expected one of",
    ),
    "complex": (
        lambda: [one(torch.complex64)],
        TypeError,
        "complex parameters cannot be ranked; expected",
    ),
    "sparse": (
        lambda: [torch.ones(3).to_sparse().requires_grad_()],
        TypeError,
        "sparse_coo are not supported; expected dense",
    ),
    "expanded": (
        lambda: [torch.ones(1).expand(3).requires_grad_()],
        ValueError,
        r"share memory; use \.contiguous\(\)",
    ),
    "two devices": (
        lambda: [one(), one(device="meta")],
        ValueError,
        "a parameter is on meta and others are on cpu; expected all on one device: use one opt",
    ),
    "two devices in two groups": (
        lambda: [{"params": [one()]}, {"params": [one(device="meta")]}],
        ValueError,
        "a parameter is on meta and others are on cpu; expected all on one device",
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    make, error, message = PARAMETERS[name]
    with pytest.raises(error, match=message):
        RoseFusedAdamW(make())


# An empty group and a group of one tensor can be added.
@pytest.mark.parametrize("name", [n for n in PARAMETERS if n not in ("none", "a tensor")])
def test_parameters_added_later(name, generator):
    make, error, message = PARAMETERS[name]
    made = make()
    group = made[-1] if isinstance(made[0], dict) else {"params": made}
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 1, generator)
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backend_asked_for_by_name_works_there_or_says_where_it_does(backend):
    with pytest.raises(
        ValueError, match=rf"backend='{backend}' runs on cpu, and the parameters are on mps; move them"
    ):
        backends.resolve(backend, torch.device("mps"))
    with pytest.raises(
        NotImplementedError, match=r"no backend for mps parameters; move the model to .*cpu"
    ):
        backends.resolve("auto", torch.device("mps"))


@pytest.fixture
def forgotten_choice() -> Iterator[None]:
    backends._first_usable.cache_clear()
    yield
    backends._first_usable.cache_clear()


@pytest.mark.usefixtures("forgotten_choice")
def test_a_backend_that_cannot_be_loaded(monkeypatch, generator):
    broken = backends.Backend("cpu", frozenset({"cpu"}), None, lambda: "it was not built")
    monkeypatch.setitem(backends.BACKENDS, "cpu", broken)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot be used: it was not built"):
        RoseFusedAdamW([one()], backend="cpu")
    # "auto" says once what it chose instead.
    with pytest.warns(UserWarning, match="uses the slow backend 'reference': 'cpu': it was not built"):
        optimizer = RoseFusedAdamW([one()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = optimizer.param_groups[0]["params"]
        train(optimizer, params, 2, generator)
        RoseFusedAdamW([one()])
    assert optimizer.state[params[0]]["step"] == 2


# ----------------------------------------------------------------- gradients and changed parameters


class Odd(nn.Parameter):
    """A parameter whose gradient need not fit: PyTorch checks what is assigned to ``.grad``, and yet
    there are ways around that (``.data``, ``swap_tensors``, subclasses)."""

    grad = None

    def __deepcopy__(self, memo):
        return Odd(self.detach().clone())


def sparse_gradient(p: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, *p.shape[1:]), p.shape, check_invariants=True
    )


WHAT = r"the gradient of the parameter of shape \(2, 3, 4\) \(elements from 40\)"
GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "sparse": (
        sparse_gradient,
        RuntimeError,
        WHAT
        + r" is sparse; RoseFusedAdamW ranks dense real gradients \(for an embedding, use sparse=False",
    ),
    "complex": (
        lambda p: torch.ones_like(p) * 1j,
        RuntimeError,
        WHAT + " is complex; RoseFusedAdamW ranks dense",
    ),
    "on another device": (
        lambda p: p.detach().to("meta"),
        RuntimeError,
        WHAT + " is on meta, expected cpu",
    ),
    "of another shape": (
        lambda p: torch.ones(2, 12),
        RuntimeError,
        WHAT + r" has shape \(2, 12\); expected the parameter's",
    ),
    "float64": (
        lambda p: p.detach().double(),
        TypeError,
        WHAT + r" is torch\.float64; expected one of",
    ),
    "integers": (lambda p: p.detach().int(), TypeError, WHAT + r" is torch\.int32; expected one of"),
}


@each_order
@each_granularity
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, order, granularity, generator):
    make, error, message = GRADIENTS[name]
    params = parameters(generator)
    params[2] = Odd(params[2].detach())
    optimizer = RoseFusedAdamW(params, order=order, granularity=granularity)
    for steps in (0, 2):
        train(optimizer, params, steps, generator)
        give(params, gradients(params, generator))
        if order != "second":
            optimizer.capture("first")
            give(params, gradients(params, generator))
        params[2].grad = make(params[2])
        snapshot = Snapshot(optimizer, params)
        with pytest.raises(error, match=message):
            optimizer.step()
        snapshot.assert_unchanged()
        with pytest.raises(error, match=message):
            optimizer.capture(optimizer.settings.kinds[0])
        snapshot.assert_unchanged()
    # Repaired, the step goes on with the mask that was captured.
    params[2].grad = None
    optimizer.step()


def test_the_sparse_gradient_of_an_embedding():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = RoseFusedAdamW(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    snapshot = Snapshot(optimizer, list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"is sparse; .*use sparse=False"):
        optimizer.step()
    snapshot.assert_unchanged()


def changed_shape(p: nn.Parameter) -> None:
    p.grad = None
    p.data = torch.randn(4, 2, 3)
    p.grad = torch.randn(4, 2, 3)


def changed_to_double(p: nn.Parameter) -> None:
    p.data = p.data.double()


def expanded(p: nn.Parameter) -> None:
    p.data = torch.randn(3, 4).expand(2, 3, 4)


def moved(p: nn.Parameter) -> None:
    other = nn.Parameter(p.detach().to("meta"))
    other.grad = torch.ones_like(other)
    torch.utils.swap_tensors(p, other)


CHANGES: dict[str, tuple[Callable[[nn.Parameter], None], type[Exception], str]] = {
    "shape": (
        changed_shape,
        RuntimeError,
        r"shape \(4, 2, 3\) \(elements from 40\) has state of shape \(2, 3, 4\) on cpu: "
        "the parameter changed its shape or device after a step; make a new optimizer",
    ),
    "to an unsupported dtype": (
        changed_to_double,
        TypeError,
        "parameters of torch.float64 are not supported",
    ),
    "to one that overlaps": (expanded, ValueError, "share memory"),
    "device": (
        moved,
        RuntimeError,
        r"has state of shape \(2, 3, 4\) on cpu: the parameter changed its shape or device",
    ),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "loaded"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_parameter_that_changed_after_a_step(name, loaded, generator):
    change, error, message = CHANGES[name]
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first")
    train(optimizer, params, 2, generator)
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    give(params, gradients(params, generator))
    optimizer.capture("first", clear=False)
    change(params[2])
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.step()
    snapshot.assert_unchanged()
    with pytest.raises(error, match=message):
        optimizer.capture("first")
    snapshot.assert_unchanged()


def test_after_a_change_of_dtype_training_goes_on_as_with_a_new_optimizer(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, weight_decay=0.1)
    train(optimizer, params, 2, generator)
    for p in params:
        p.grad = None
        p.data = p.data.bfloat16()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    new = RoseFusedAdamW(others, weight_decay=0.1)
    new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grads = gradients(params, generator)
    for optim, own in ((optimizer, params), (new, others)):
        give(own, grads)
        optim.step()
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], new.state[other][key])
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32


# ------------------------------------------------------------------------------- the order of calls


@pytest.mark.parametrize("order", ["first", "ensemble"])
@each_granularity
def test_a_missing_mask(order, granularity, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order, granularity=granularity)
    message = (
        rf"^order='{order}' needs a first-order mask: call kl\.backward\(\) and "
        r'optimizer\.capture\("first"\) before step\(\) \(rose_ops\.rose_backward does both\)$'
    )
    for steps in (0, 2):
        train(optimizer, params, steps, generator)
        give(params, gradients(params, generator))
        if order == "ensemble":  # the other mask is not enough
            optimizer.capture("second", clear=False)
        snapshot = Snapshot(optimizer, params)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        snapshot.assert_unchanged()
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize(
    ("order", "kind", "expected"),
    [
        ("first", "second", "'first'"),
        ("second", "first", "'second'"),
        ("ensemble", "third", "'first' or 'second'"),
        ("first", None, "'first'"),
    ],
)
def test_a_capture_that_the_order_has_no_use_for(order, kind, expected, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order)
    give(params, gradients(params, generator))
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(
        ValueError,
        match=rf"^capture\({kind!r}\): order='{order}' has no such mask; expected {expected}$",
    ):
        optimizer.capture(kind)
    snapshot.assert_unchanged()


@each_order
def test_a_capture_without_gradients(order, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order)
    kind = optimizer.settings.kinds[0]
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(
        RuntimeError, match=rf"^capture\('{kind}'\): no parameter has a gradient; call backward"
    ):
        optimizer.capture(kind)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("what", ["step", "capture"])
@each_order
def test_optimizer_in_backward_is_refused(what, order, generator):
    """A ranking over all gradients cannot start before they are all there."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    params = list(model.parameters())
    optimizer = RoseFusedAdamW(params, order=order)
    # What it would have found in the middle of the pass: state, and a captured mask.
    train(optimizer, params, 2, generator)
    if order != "second":
        give(params, gradients(params, generator))
        optimizer.capture("first")
    optimizer.zero_grad()
    before = copy.deepcopy([p.detach() for p in params])
    taken = [dict(optimizer.state[p]) for p in params]
    call = optimizer.step if what == "step" else lambda: optimizer.capture(optimizer.settings.kinds[0])
    handles = [p.register_post_accumulate_grad_hook(lambda p: call()) for p in params]
    with pytest.raises(
        RuntimeError, match=r"inside a backward pass.*needs all gradients: call it after"
    ):
        model(torch.randn(4, 5, generator=generator)).sum().backward()
    assert all(map(torch.equal, params, before))
    for p, state in zip(params, taken, strict=True):
        assert optimizer.state[p].keys() == state.keys()
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
    # Afterwards it works as ever.
    for handle in handles:
        handle.remove()
    optimizer.step()


@each_order
def test_an_error_in_the_closure_changes_nothing(order, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order)
    train(optimizer, params, 1, generator)
    if order != "second":
        give(params, gradients(params, generator))
        optimizer.capture("first")
    give(params, gradients(params, generator))
    snapshot = Snapshot(optimizer, params)

    def closure() -> Tensor:
        raise ArithmeticError("of the user")

    with pytest.raises(ArithmeticError, match="of the user"):
        optimizer.step(closure)
    snapshot.assert_unchanged()
    optimizer.step()


# ------------------------------------------------------------------------------- the functional API


def lists(generator: torch.Generator) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs, steps; of three tensors."""
    made = [[torch.randn(4, generator=generator) for _ in range(3)] for _ in range(3)]
    return [
        *made,
        [torch.rand(4, generator=generator) for _ in range(3)],
        [torch.ones(()) for _ in range(3)],
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"upper": 0.0}, ValueError, r"^upper=0\.0 \(float\); expected 0 < upper <= 1"),
        ({"lower": 0.6}, ValueError, r"^lower=0\.6 \(float\); expected 0 <= lower < upper"),
        ({"inactive": "x"}, ValueError, r"^inactive='x' \(str\); expected one of"),
        ({"selection": "x"}, ValueError, r"^selection='x' \(str\); expected one of"),
        ({"backend": "x"}, ValueError, r"^backend='x' \(str\); expected one of"),
        ({"backend": "cuda"}, ValueError, "'cuda' runs on cuda"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("function", [select_threshold, capture_mask])
def test_arguments_of_the_functional_api(function, arguments, error, message, generator):
    _, grads, exp_avgs, *_ = lists(generator)
    with pytest.raises(error, match=message):
        function(grads, exp_avgs, **arguments)


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda columns: columns[1].pop(), id="a gradient too few"),
        pytest.param(lambda columns: columns[4].pop(), id="a step too few"),
        pytest.param(
            lambda columns: columns[2].__setitem__(2, torch.ones(5)), id="moment of another shape"
        ),
        pytest.param(
            lambda columns: columns[1].__setitem__(2, torch.ones(4).double()), id="float64 gradient"
        ),
        pytest.param(lambda columns: columns[4].__setitem__(2, torch.ones(2)), id="two steps"),
    ],
)
def test_lists_that_do_not_fit_together(break_it, generator):
    columns = lists(generator)
    break_it(columns)
    before = copy.deepcopy(columns)
    with pytest.raises(RuntimeError):
        rose_adamw_(*columns, weight_decay=0.1, backend="cpu")
    for column, old in zip(columns, before, strict=True):
        assert all(map(torch.equal, column, old))


def test_masks_that_do_not_fit(generator):
    columns = lists(generator)
    masks, _ = capture_mask(columns[1], columns[2])
    before = copy.deepcopy(columns)
    for wrong in (
        masks[:2],
        [masks[0], masks[1], torch.zeros(3, dtype=torch.uint8)],
        [m.int() for m in masks],
    ):
        with pytest.raises(RuntimeError, match="second_masks"):
            rose_adamw_(*columns, second_masks=wrong, weight_decay=0.1, backend="cpu")
    for column, old in zip(columns, before, strict=True):
        assert all(map(torch.equal, column, old))


def test_clones_are_what_snapshots_compare():
    """The comparison of all the tests above can fail."""
    p = one()
    optimizer = RoseFusedAdamW([p])
    for change in (
        lambda: p.data.add_(1),
        lambda: optimizer.state[p].update(step=torch.ones(())),
        lambda: optimizer.param_groups[0].update(lr=3.0),
        lambda: optimizer.add_param_group({"params": clones([p])}),
        lambda: setattr(p, "grad", torch.ones(3)),
        lambda: setattr(optimizer, "found_inf", torch.ones(())),
    ):
        snapshot = Snapshot(optimizer, [p])
        snapshot.assert_unchanged()
        change()
        with pytest.raises(AssertionError):
            snapshot.assert_unchanged()


def columns_of(n: int = 20) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(n)
    g, m, p = (torch.randn(n) for _ in range(3))
    return {
        "params": [p],
        "grads": [g],
        "exp_avgs": [m],
        "exp_avg_sqs": [g**2],
        "steps": [torch.tensor(3.0)],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 7.0}, "gamma=7.0 (float); expected 0 < gamma < 1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"betas": (2.0, 3.0)}, "betas=(2.0, 3.0) (tuple); expected two numbers in [0, 1)"),
        ({"betas": (0.9,)}, "expected a pair of numbers"),
        ({"eps": -1.0}, "eps=-1.0 (float); expected a number >= 0"),
        ({"lr": float("nan")}, "lr=nan (float); expected a number >= 0"),
        ({"lr": torch.ones(2)}, "expected a number or a tensor of one element"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 (float); expected a number >= 0"),
        ({"maximize": 1}, "maximize=1 (int); expected True or False"),
        ({"seed": -1}, "seed=-1 (int); expected an integer >= 0 and < 4294967296"),
        ({"seed": 0.5}, "seed=0.5 (float); expected an integer"),
    ],
    ids=str,
)
def test_options_of_an_update_without_an_optimizer(options, message):
    columns = columns_of()
    before = copy.deepcopy(columns)
    with pytest.raises(ValueError, match=re.escape(message)):
        rose_adamw_(**columns, **options)
    for name, tensors in columns.items():
        assert_all_same_bits(tensors, before[name], name)


def test_parameters_of_an_update_that_share_memory():
    columns = columns_of()
    two = {name: [x[0], x[0].clone()] for name, x in columns.items()}
    with pytest.raises(ValueError, match="params has a tensor more than once"):
        rose_adamw_(**two | {"params": [columns["params"][0]] * 2})
    whole = torch.randn(30)
    with pytest.raises(ValueError, match="share memory"):
        rose_adamw_(**two | {"params": [whole[:20], whole[10:]]})


@pytest.mark.parametrize("function", [select_threshold, capture_mask])
def test_rankings_without_an_optimizer(function):
    columns = columns_of()
    for beta1 in (2.0, 1.0, -0.1, float("nan"), "0.9"):
        with pytest.raises(ValueError, match=r"beta1=.*; expected a number in \[0, 1\)"):
            function(columns["grads"], columns["exp_avgs"], beta1=beta1)
    with pytest.raises(ValueError, match="1 gradients and 0 first moments; expected as many, or None"):
        function(columns["grads"], [])
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(ValueError, match=r"seed=.*; expected an integer >= 0"):
            function(columns["grads"], seed=seed)


def test_a_scale_that_is_a_number(generator):
    """As GradScaler.get_scale() returns it."""
    masks = []
    for scale in (4096.0, torch.tensor(4096.0), 1):
        p = torch.nn.Parameter(torch.zeros(100))
        optimizer = RoseFusedAdamW([p], order="ensemble", upper=0.5)
        p.grad = torch.randn(100, generator=torch.Generator().manual_seed(1)) * float(scale)
        optimizer.capture("second", grad_scale=scale)
        masks.append(optimizer.state[p]["second_mask"])
    assert_all_same_bits(masks[1:], masks[:1] * 2, "masks")


@pytest.mark.parametrize("scale", [0.0, -2.0, float("inf"), float("nan"), True, "2", torch.ones(2)])
def test_a_scale_that_is_none(scale):
    p = torch.nn.Parameter(torch.zeros(100))
    optimizer = RoseFusedAdamW([p], order="first")
    p.grad = torch.ones(100)
    with pytest.raises(ValueError, match=r"grad_scale=.*; expected None, a number > 0 or a tensor"):
        optimizer.capture("first", grad_scale=scale)
    assert p.grad is not None
    assert not optimizer._captures.kinds
