"""Directions, loss surfaces and interpolations of the study."""

import copy

import pytest
import torch
from support import assert_same_bits
from torch import nn
from torch.nn import functional as F

from benchmarks.paper import geometry


class Tied(nn.Module):
    """An embedding that is the output's matrix, too, and layers of every kind of shape."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.convolution = nn.Conv1d(6, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.layer = nn.Linear(4, 6)
        self.output = nn.Linear(6, 7)
        self.output.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(2, 3), requires_grad=False)
        self.scalar = nn.Parameter(torch.randn(()))

    def forward(self, tokens):
        x = self.convolution(self.embedding(tokens).mT).mT
        return self.output(self.layer(self.norm(x))).mean(1) * self.scalar


@pytest.fixture
def model(generator):
    torch.manual_seed(generator.initial_seed())
    return Tied()


@pytest.fixture
def measure(model, generator):
    tokens = torch.randint(7, (5, 4), generator=generator)
    labels = torch.randint(7, (5,), generator=generator)

    def loss_and_accuracy():
        with torch.no_grad():
            logits = model(tokens)
        return F.cross_entropy(logits, labels).item(), (
            logits.argmax(1) == labels
        ).float().mean().item()

    return loss_and_accuracy


def assert_unchanged(model, before):
    for (name, p), (_, q) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert_same_bits(p, q, name)


def test_directions_have_the_norms_of_the_filters(model, generator):
    with torch.no_grad():
        model.embedding.weight[2] = 0  # as that of padding is
    direction = geometry.random_direction(model, generator)
    assert list(direction) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert direction[name].shape == p.shape
        if p.ndim < 2:
            assert not direction[name].any(), name
            continue
        of_filters = [direction[name].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1)]
        torch.testing.assert_close(*of_filters)
        assert not torch.allclose(direction[name], p), name
    assert direction["embedding.weight"][2].count_nonzero() == 0


def test_two_directions_of_one_model_are_almost_orthogonal(generator):
    wide = nn.Linear(4000, 3)
    first, second = (geometry.random_direction(wide, generator)["weight"] for _ in range(2))
    cosine = F.cosine_similarity(first, second)
    assert cosine.abs().max() < 6 / 4000**0.5  # six standard deviations


def test_a_surface_is_the_loss_at_moved_parameters(model, measure):
    before = copy.deepcopy(model)
    center = measure()
    points = list(geometry.surface(model, measure, [-0.25, 0.0, 0.125], seed=5))
    assert_unchanged(model, before)
    assert [(x["alpha"], x["beta"]) for x in points[:4]] == [
        (-0.25, -0.25), (-0.25, 0.0), (-0.25, 0.125), (0.0, -0.25),
    ]  # fmt: skip
    assert (points[4]["loss"], points[4]["accuracy"]) == center
    assert len({x["loss"] for x in points}) == 9
    generator = torch.Generator().manual_seed(5)
    delta, eta = (geometry.random_direction(model, generator) for _ in "de")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.125 * delta[name] - 0.25 * eta[name])
    assert points[6]["loss"] == pytest.approx(measure()[0], rel=1e-5)


def test_equal_seeds_give_equal_surfaces(model, measure):
    surfaces = [list(geometry.surface(model, measure, [-0.1, 0.2], seed)) for seed in (1, 1, 2)]
    assert surfaces[0] == surfaces[1]
    assert surfaces[0] != surfaces[2]


def test_an_interpolation_ends_at_both_models(model, measure, generator):
    torch.manual_seed(generator.initial_seed() + 1)
    other = Tied()
    losses = []
    for end in (model, other):
        with geometry.restored(model):
            geometry.move(model, geometry.weights(end))
            losses.append(measure())
    assert losses[0] != losses[1]
    before = copy.deepcopy(model)
    ends = [geometry.weights(x) for x in (model, other)]
    points = list(geometry.interpolation(model, *ends, measure, [-0.5, 0, 0.5, 1, 1.5]))
    assert_unchanged(model, before)
    assert [(x["loss"], x["accuracy"]) for x in points if x["alpha"] in (0, 1)] == losses
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_((p + q) / 2)
    assert points[2]["loss"] == pytest.approx(measure()[0], rel=1e-5)


def test_models_of_two_architectures_are_refused(model, measure):
    ends = geometry.weights(model)
    wrong = ends | {"layer.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"second: layer.weight .* \(2, 2\); expected \(6, 4\)"):
        next(geometry.interpolation(model, ends, wrong, measure, [0]))
    with pytest.raises(ValueError, match=r"first: bias has shape \(2,\); expected None"):
        next(geometry.interpolation(model, geometry.weights(nn.Linear(2, 2)), ends, measure, [0]))


def test_parameters_are_restored_when_a_measurement_fails(model):
    before = copy.deepcopy(model)

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(geometry.surface(model, fail, [0.25], seed=0))
    assert_unchanged(model, before)


def test_a_surface_that_is_left_early_restores_the_parameters(model, measure):
    before = copy.deepcopy(model)
    points = geometry.surface(model, measure, [0.25, 0.5], seed=0)
    next(points)
    points.close()
    assert_unchanged(model, before)
