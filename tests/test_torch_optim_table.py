"""PyTorch's own table of optimizer cases, with ``RoseFusedAdamW(upper=1)`` in the place of AdamW.

The table is ``torch.testing._internal.common_optimizers``, which ships with PyTorch. Every case of it
is either run here, or skipped by name with a reason; a case that a newer PyTorch adds fails until it
is one or the other.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import ulp
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW

pytest.importorskip("expecttest", reason="PyTorch's table of optimizer cases needs expecttest")
from torch.testing._internal import common_optimizers as table

ADAMW = next(info for info in table.optim_db if info.optim_cls is AdamW)
ADAM = next(info for info in table.optim_db if info.optim_cls is torch.optim.Adam)

# -------------------------------------------------------------------------------- what is left out

FLAGS = {
    "foreach": "picks one of AdamW's implementations; here there is one",
    "fused": "picks one of AdamW's implementations; here there is one, and it is fused",
    "differentiable": "the step is not differentiable",
}
TAKEN = ("foreach", "fused")  # and nothing is different with them
_AMSGRAD = "ROSE has no amsgrad variant"
_CAPTURABLE = "for CUDA graphs"
BASES = {
    "default": None,
    "non-default lr": None,
    "nonzero weight_decay": None,
    "maximize": None,
    "Tensor lr": None,
    "amsgrad": _AMSGRAD,
    "capturable": _CAPTURABLE,
    "capturable, amsgrad": _AMSGRAD,
    "Tensor lr with capturable and amsgrad": _AMSGRAD,
    "Tensor lr, Tensor betas, with capturable": _CAPTURABLE,
    "Tensor lr, Tensor betas, with capturable and amsgrad": _AMSGRAD,
}
LEFT_OUT = {
    **{base: reason for base, reason in BASES.items() if reason},
    **{
        f"{base} & {flag}": reason
        for base in BASES
        for flag, reason in FLAGS.items()
        if (base, flag) != ("Tensor lr", "foreach")  # the table has this case for MPS alone
    },
    "complex parameters": "a complex number has no rank",
    "parameters on several devices": "one ranking is on one device",
}


def cases() -> dict[str, dict[str, Any]]:
    """Keyword arguments of the table's cases by name, those that only some devices have included."""
    found: dict[str, dict[str, Any]] = {}
    for device in ("cpu", "cuda", "mps"):
        for case in table._get_optim_inputs_including_global_cliquey_kwargs(
            device, torch.float32, ADAMW
        ):
            # A flag that is off is the case without it.
            kwargs = {key: x for key, x in case.kwargs.items() if key not in FLAGS or x}
            found.setdefault(case.desc, kwargs)
    found |= {"complex parameters": {}} if ADAMW.supports_complex else {}
    found |= {"parameters on several devices": {}} if ADAMW.supports_multiple_devices else {}
    found |= {"sparse gradients": {}} if ADAMW.supports_sparse else {}
    return found


CASES = cases()
every_case = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skip(LEFT_OUT[name])) if name in LEFT_OUT else name
        for name in CASES
    ],
)
# The skips are shown once, by the test that uses every_case.
each_that_applies = pytest.mark.parametrize("name", [name for name in CASES if name not in LEFT_OUT])


def arguments(name: str) -> dict[str, Any]:
    """Those of a case, with weight decay in every one: without, an error in it would not show."""
    return {"weight_decay": 0.1, **copy.deepcopy(CASES[name])}


def parameters_of(name: str) -> list[Tensor]:
    if name == "complex parameters":
        return [nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))]
    if name == "parameters on several devices":
        return [nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, device="meta"))]
    return [nn.Parameter(torch.randn(2))]


def is_refused(name: str) -> bool:
    try:
        RoseFusedAdamW(parameters_of(name), upper=1, **CASES[name])
    except (TypeError, ValueError):
        return True
    return False


def test_what_is_left_out_is_exactly_what_is_refused():
    taken = {f"{base} & {flag}" for base, reason in BASES.items() for flag in TAKEN if not reason}
    assert {name for name in CASES if is_refused(name)} == set(LEFT_OUT) - taken


# ---------------------------------------------------------------------------------------- lockstep

SHAPES = [(10, 5), (10,), (), (0, 3), (4, 3, 3, 3), (61, 17)]
Build = Callable[[type[Optimizer], list[Tensor], dict[str, Any]], Optimizer]


class Lockstep:
    """ROSE with upper=1, ``AdamW(fused=True)`` and AdamW in float64, on the same gradients."""

    NAMES = ("rose", "fused", "truth")

    def __init__(
        self,
        generator: torch.Generator,
        kwargs: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        options: tuple[dict[str, Any], ...] = ({},),
    ) -> None:
        """``options`` are those of the parameter groups, among which the parameters are dealt out."""
        self.generator, self.dtype, self.steps = generator, dtype, 0
        start = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        self.params: dict[str, list[Tensor]] = {}
        self.optimizers: dict[str, Optimizer] = {}
        for name in self.NAMES:
            params = [
                nn.Parameter(x.to(torch.float64 if name == "truth" else dtype, copy=True))
                for x in start
            ]
            params[4].data = params[4].data.to(memory_format=torch.channels_last)

            def own(given: dict[str, Any], name: str = name) -> dict[str, Any]:
                given = copy.deepcopy(given)  # schedulers write to a tensor lr
                if name == "truth" and "lr" in given:
                    given["lr"] = float(given["lr"])  # AdamW would compute with it in float32
                return given

            groups = [
                {"params": params[i :: len(options)], **own(option)} for i, option in enumerate(options)
            ]
            if name == "rose":
                self.optimizers[name] = RoseFusedAdamW(groups, upper=1, **own(kwargs))
            else:
                flags = {"fused": True} if name == "fused" else {"foreach": False}
                self.optimizers[name] = AdamW(groups, **flags, **own(kwargs))
            self.params[name] = params
        self.largest = {key: [x.double().abs() for x in xs] for key, xs in self.values("truth").items()}

    def values(self, name: str) -> dict[str, list[Tensor]]:
        """Parameters and moments."""
        state = self.optimizers[name].state
        params = self.params[name]
        return {
            "params": [p.detach().clone() for p in params],
            **{
                key: [state[p][key].clone() if p in state else torch.zeros(p.shape) for p in params]
                for key in ("exp_avg", "exp_avg_sq")
            },
        }

    def random_gradients(self) -> list[Tensor]:
        return [
            torch.randn(shape, generator=self.generator).to(self.dtype) * 10.0 ** (i % 3 - 1)
            for i, shape in enumerate(SHAPES)
        ]

    def step(self, grads: list[Tensor | None] | None = None) -> None:
        if grads is None:
            grads = self.random_gradients()
        # The truth's own schedulers do not round to float32, as they do in a tensor lr.
        for truth, fused in zip(
            self.optimizers["truth"].param_groups, self.optimizers["fused"].param_groups, strict=True
        ):
            truth["lr"] = float(fused["lr"])
        for name in self.NAMES:
            for p, g in zip(self.params[name], grads, strict=True):
                # In the parameter's layout: AdamW(fused=True) on the CPU takes no other, silently.
                p.grad = None if g is None else torch.empty_like(p).copy_(g)
            self.optimizers[name].step()
        self.record()

    def record(self) -> None:
        """After every step."""
        self.steps += 1
        for key, xs in self.values("truth").items():
            self.largest[key] = [
                torch.maximum(a, x.double().abs()) for a, x in zip(self.largest[key], xs, strict=True)
            ]

    def error(self, name: str, key: str) -> float:
        """Largest difference to the truth, in ulps of the largest value that the element has had.

        (Of the present value it would be noise: some parameter is always just passing through 0.)
        """
        errors = [
            ((x.double() - t).abs() / ulp(a, self.dtype)).reshape(-1)
            for x, t, a in zip(
                self.values(name)[key], self.values("truth")[key], self.largest[key], strict=True
            )
        ]
        return torch.cat(errors).max().item()

    def check(self) -> None:
        for key in ("params", "exp_avg", "exp_avg_sq"):
            # Nothing can be expected to be closer than half an ulp. (Where the fused AdamW itself went
            # wrong, twice its error would allow anything.)
            assert self.error("fused", key) < 100
            allowed = 2 * max(self.error("fused", key), 0.5)
            # Each error is the largest of a thousand random walks, so two that are alike can be twice
            # as far off as each other by chance. What roundings add up to is allowed for certain.
            if key == "exp_avg":
                # The definition of ROSE rounds m where AdamW need not: two coefficients, two products
                # and a sum, half an ulp each, and beta1 of it stays for the next step.
                beta1 = max(group["betas"][0] for group in self.optimizers["rose"].param_groups)
                allowed = max(allowed, 2.5 / (1 - float(beta1)))
            else:
                # In every step a coefficient (the decay, or beta2), its product and a sum, half an ulp
                # each; what is added has roundings, too, but of something smaller.
                allowed = max(allowed, 1.5 * self.steps)
            assert self.error("rose", key) <= allowed, key
        for p, q in zip(self.params["rose"], self.params["fused"], strict=True):
            rose, fused = (self.optimizers[n].state.get(x) for n, x in (("rose", p), ("fused", q)))
            assert (rose is None) == (fused is None)
            if rose is not None:
                assert rose.keys() == fused.keys()
                assert rose["step"].dtype == fused["step"].dtype
                assert rose["step"] == fused["step"]
                assert rose["exp_avg"].stride() == fused["exp_avg"].stride()


@every_case
def test_lockstep_with_adamw(name, generator):
    lockstep = Lockstep(generator, arguments(name))
    before = lockstep.values("rose")["params"]
    for _ in range(20):
        lockstep.step()
    lockstep.check()
    for x, y in zip(before, lockstep.params["rose"], strict=True):
        assert x.numel() == 0 or not torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_that_applies
def test_lockstep_in_half_precision(name, dtype, generator):
    # PyTorch's table raises eps for float16, where AdamW's second moments underflow. Both do here.
    lockstep = Lockstep(generator, {"eps": 0.1, **arguments(name)}, dtype)
    for _ in range(20):
        lockstep.step()
    lockstep.check()


SCHEDULERS = [
    pytest.param(makers, id=f"{info.name}-{i}")
    for info in (ADAMW, ADAM)  # the table has more of them for Adam
    for i, makers in enumerate(info.scheduler_inputs)
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("makers", SCHEDULERS)
@each_that_applies
def test_lockstep_under_the_table_s_schedulers(name, makers, generator):
    lockstep = Lockstep(generator, arguments(name))
    schedulers = {n: [make(o) for make in makers] for n, o in lockstep.optimizers.items()}
    used: dict[str, list[float]] = {n: [] for n in lockstep.NAMES}
    for _ in range(13):
        for n, optimizer in lockstep.optimizers.items():
            used[n].append(float(optimizer.param_groups[0]["lr"]))
        lockstep.step()
        for scheduler in itertools.chain(*schedulers.values()):
            # A loss that does not fall makes the plateau scheduler act.
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
    lockstep.check()
    assert used["rose"] == used["fused"]
    assert len(set(used["rose"])) > 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(({"weight_decay": 0.3}, {}), id="weight_decay"),
        pytest.param(({"lr": 0.05}, {"weight_decay": 0.3}), id="lr"),
        pytest.param(({"betas": (0.5, 0.9)}, {}, {"eps": 1e-4}), id="betas-eps"),
        pytest.param(({"maximize": True}, {"maximize": False}), id="maximize"),
        pytest.param(({"lr": torch.tensor(0.02)}, {"lr": 0.01}), id="tensor-lr-in-one"),
    ],
)
@each_that_applies
def test_lockstep_with_parameter_groups(name, options, generator):
    lockstep = Lockstep(generator, arguments(name), options=options)
    for _ in range(10):
        lockstep.step()
    lockstep.check()


@each_that_applies
def test_lockstep_where_gradients_come_and_go(name, generator):
    """AdamW counts steps for each parameter; parameters without a gradient stay as they are."""
    lockstep = Lockstep(generator, arguments(name))
    for i in range(9):
        grads: list[Tensor | None] = list(lockstep.random_gradients())
        grads[0] = None if i < 4 else grads[0]
        grads[1] = None if i % 2 else grads[1]
        grads[5] = None
        lockstep.step(grads)
    lockstep.check()
    state = lockstep.optimizers["rose"].state
    params = lockstep.params["rose"]
    assert [int(state[p]["step"]) for p in params[:5]] == [5, 5, 9, 9, 9]
    assert params[5] not in state


@each_that_applies
def test_closure(name, generator):
    lockstep = Lockstep(generator, arguments(name))
    calls = []
    for step in range(5):
        grads = lockstep.random_gradients()
        for optimizer_name in lockstep.NAMES:
            params = lockstep.params[optimizer_name]
            optimizer = lockstep.optimizers[optimizer_name]

            def closure(params=params, optimizer=optimizer, step=step, grads=grads):
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(params, grads, strict=True))
                loss.backward()
                params[4].grad = params[4].grad.to(memory_format=torch.channels_last)
                return loss.detach() * 0 + step

            assert optimizer.step(closure) == step
        lockstep.record()
    assert calls == [True] * 15
    lockstep.check()


# ------------------------------------------------------ further tests that PyTorch runs on a table


def regression(name: str, generator: torch.Generator, lr: float | None = None):
    """The problem of PyTorch's tests: a small least-squares loss."""
    weight = nn.Parameter(torch.randn(10, 5, generator=generator))
    bias = nn.Parameter(torch.randn(10, generator=generator))
    x = torch.randn(5, generator=generator)
    kwargs = arguments(name)
    if lr is not None:
        kwargs["lr"] = torch.tensor(lr) if isinstance(kwargs.get("lr"), Tensor) else lr
    optimizer = RoseFusedAdamW([weight, bias], upper=1, **kwargs)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return optimizer, closure


@each_that_applies
def test_goes_in_the_right_direction(name, generator):
    optimizer, closure = regression(name, generator, lr=1e-2)
    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    last = closure().item()
    assert last > first if optimizer.param_groups[0]["maximize"] else last < first


@each_that_applies
def test_a_zero_gradient_changes_a_parameter_by_weight_decay_only(name):
    p = nn.Parameter(torch.randn(5, 3))
    before = p.detach().double()
    kwargs = arguments(name)
    optimizer = RoseFusedAdamW([p], upper=1, **kwargs)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    decay = 1 - float(kwargs.get("lr", 1e-3)) * kwargs["weight_decay"]
    assert ((p - before * decay).abs() <= ulp(before)).all()
    assert not torch.equal(p, before.float())


@each_that_applies
def test_no_gradient_at_all_is_no_step(name, generator):
    optimizer, _ = regression(name, generator)
    before = copy.deepcopy([optimizer.param_groups[0]["params"], optimizer.state_dict()])
    optimizer.step()
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before[0]))
    assert optimizer.state_dict() == before[1]
    assert optimizer.state_dict()["state"] == {}


@each_that_applies
def test_printing_names_every_option(name, generator):
    optimizer, _ = regression(name, generator)
    printed = str(optimizer)
    assert "Parameter Group 0" in printed
    for key in ("lr", "betas", "eps", "weight_decay", "maximize", "selective", "upper"):
        assert key in printed


@each_that_applies
def test_state_whose_step_is_a_number(name, generator):
    """Very old checkpoints of AdamW have it so."""
    optimizer, closure = regression(name, generator)
    for _ in range(3):
        optimizer.step(closure)
    old = copy.deepcopy(optimizer.state_dict())
    for values in old["state"].values():
        values["step"] = values["step"].item()
    again = copy.deepcopy(optimizer)
    again.load_state_dict(old)
    for p, q in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert p["step"].dtype == torch.float32
        assert torch.equal(p["step"], q["step"])


@each_that_applies
def test_a_state_dict_without_newer_options_gets_their_defaults(name, generator):
    optimizer, closure = regression(name, generator)
    optimizer.step(closure)
    older = copy.deepcopy(optimizer.state_dict())
    del older["rose"]
    for flag in ("maximize", "capturable"):
        for group in older["param_groups"]:
            del group[flag]
    other, closure = regression(name, generator)
    other.load_state_dict(older)
    other.step(closure)
    assert set(other.param_groups[0]) == set(optimizer.param_groups[0])
    assert other.param_groups[0]["maximize"] is arguments(name).get("maximize", False)


@each_that_applies
def test_deepcopy_copies_all_public_attributes(name, generator):
    optimizer, closure = regression(name, generator)
    for _ in range(2):
        optimizer.step(closure)

    def public(optimizer):
        return {key for key in vars(optimizer) if not key.startswith("_")}

    copied = copy.deepcopy(optimizer)
    assert public(copied) == public(optimizer)
    assert copied.settings == optimizer.settings
    assert copied.defaults.items() >= optimizer.defaults.items()


# ------------------------------------------------------------------------------------ error inputs

ERRORS = {
    f"{case.optimizer_error_input.desc} #{i}": case
    for i, case in enumerate(ADAMW.optim_error_inputs_func("cpu", torch.float32))
}
# The same error in our words; PyTorch's own where nothing is listed here.
OUR_WORDS = {
    "a param group cannot have duplicate parameters": (
        # PyTorch warns that this will be an error. Updated from two threads it would be a race.
        ValueError,
        r"more than once in a group; expected once",
    ),
    "Tensor lr must be 1-element": (ValueError, r"lr=.*expected a number or a tensor of one element"),
    "beta1 should be between 0 and 1": (
        ValueError,
        r"betas=\(1\.0, 0\.0\) \(tuple\); expected two numbers in \[0, 1\)",
    ),
    "weight_decay should > 0": (ValueError, r"weight_decay=-1 \(int\); expected a number >= 0"),
    "betas must be either both floats or both Tensors": (
        ValueError,
        r"betas=.*expected two numbers or two tensors",
    ),
}
ERRORS_LEFT_OUT = {
    "lr as Tensor doesn't work with foreach & not capturable": "there is no foreach",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": (
        "there is no foreach"
    ),
}


def test_the_listed_errors_are_those_of_the_table():
    of_the_table = {case.optimizer_error_input.desc for case in ERRORS.values()}
    assert set(OUR_WORDS) | set(ERRORS_LEFT_OUT) <= of_the_table
    for case in ERRORS.values():
        is_about_flags = any(flag in case.optimizer_error_input.kwargs for flag in FLAGS)
        assert is_about_flags == (case.optimizer_error_input.desc in ERRORS_LEFT_OUT)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skip(ERRORS_LEFT_OUT[case.optimizer_error_input.desc]))
        if case.optimizer_error_input.desc in ERRORS_LEFT_OUT
        else name
        for name, case in ERRORS.items()
    ],
)
def test_error_input(name):
    case = ERRORS[name]
    given = case.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(1))]
    error, words = OUR_WORDS.get(given.desc, (case.error_type, case.error_regex))
    assert case.error_on is table.OptimizerErrorEnum.CONSTRUCTION_ERROR
    with pytest.raises(error, match=words):
        RoseFusedAdamW(params, upper=1, **given.kwargs)


@pytest.mark.filterwarnings("error")
def test_adamw_s_own_errors_are_as_the_table_says():
    """So that the comparison above is with what PyTorch does, not with what the table claims."""
    for case in ERRORS.values():
        given = case.optimizer_error_input
        params = given.params if given.params is not None else [nn.Parameter(torch.randn(1))]
        with pytest.raises(case.error_type, match=case.error_regex):
            AdamW(params, **given.kwargs)
