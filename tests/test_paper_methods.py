"""The methods of `benchmarks/paper`: three steps of each on a tiny model, against plain PyTorch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import one_thread as one_thread

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.paper.methods import METHODS, has_granularity
from benchmarks.paper.runs import Run
from rose_ops.finetune.recipes import Context, Method, Settings
from rose_ops.finetune.runtime import Runtime
from rose_ops.finetune.train import batches

RUNTIME = Runtime(torch.device("cpu"), "float32")
RUN = Run("adamw", "sst2", lr=0.01, upper=0.6, r_drop=0.7, batch_size=4, max_grad_norm=0.05)
SEED = 3


class Tiny(nn.Module):
    """A classifier of words, with dropout, and names that `selective="encoder-weights"` looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.layer = nn.Linear(6, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.layer_two = nn.Linear(8, 6)
        self.classifier = nn.Linear(6, 2)
        self.dropout = nn.Dropout(0.2)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.after(self.words(input_ids), attention_mask))

    def after(self, embedded: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, from word embeddings."""
        x = self.layer_norm(self.layer(self.dropout(embedded)).tanh())
        x = self.layer_two(self.dropout(x)) * attention_mask.unsqueeze(-1)
        return self.classifier(self.dropout(x.sum(1) / attention_mask.sum(1, keepdim=True)))


class Data:
    """Stands in for `Encoded`: 24 sentences of three to eight words."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.lengths = torch.randint(3, 9, (24,), generator=generator).tolist()
        self.words = torch.randint(0, 20, (24, 8), generator=generator)
        self.labels = torch.randint(0, 2, (24,), generator=generator)

    def batch(self, indices):
        lengths = torch.tensor([self.lengths[i] for i in indices])
        mask = (torch.arange(8) < lengths[:, None]).long()
        return {"input_ids": self.words[indices], "attention_mask": mask}, self.labels[indices]


Gradients = list[Tensor]


class ByHand:
    """Masked AdamW as in Algorithm 1, in plain PyTorch, and what each method needs for it."""

    def __init__(self, model: Tiny, method: Method, settings: Settings, data: Data) -> None:
        self.model, self.method, self.settings, self.data = model, method, settings, data
        named = dict(model.named_parameters())
        self.params = list(named.values())
        self.ranked = [i for i, n in enumerate(named) if "layer" in n and "weight" in n]
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in "mv")
        self.t = 0
        self.lr = settings.lr * method.options.get("lr_scale", 1)
        self.generator = torch.Generator().manual_seed(SEED)  # what recipes draw themselves
        self.average = [p.detach().clone() for p in self.params]
        self.scores = torch.full((len(self.ranked),), 0.5)

    # ------------------------------------------------------------------------------------ the update

    def update(self, grads: Gradients, masks: list[Tensor | float]) -> None:
        self.t += 1
        (b1, b2), s = self.settings.betas, self.settings
        for i, (p, g, mask) in enumerate(zip(self.params, grads, masks, strict=True)):
            mixed = mask * g + (1 - mask) * self.m[i]
            self.m[i] = b1 * self.m[i] + (1 - b1) * mixed
            self.v[i] = b2 * self.v[i] + (1 - b2) * mixed**2
            decay = s.weight_decay if p.dim() > 1 else 0.0
            mhat, vhat = self.m[i] / (1 - b1**self.t), self.v[i] / (1 - b2**self.t)
            p.data -= self.lr * mask * (mhat / (vhat.sqrt() + s.eps) + decay * p.data)

    def clipped(self, grads: Gradients) -> Gradients:
        norm = torch.cat([g.flatten() for g in grads]).norm()
        return [g * min(1.0, float(self.settings.max_grad_norm / (norm + 1e-6))) for g in grads]

    def plain(self) -> list[Tensor | float]:
        return [1.0] * len(self.params)

    def of_ranked(self, masks: list[Tensor]) -> list[Tensor | float]:
        found = self.plain()
        for i, mask in zip(self.ranked, masks, strict=True):
            found[i] = mask.float()
        return found

    # --------------------------------------------------------------------------------------- rankings

    def kept(self, risks: list[Tensor], active: list[Tensor], lower: float, upper: float):
        """Masks of the elements, or of whole tensors, between two fractions of the ranking."""
        if self.settings.granularity == "tensor":
            every = torch.stack(risks)
            if not all(active):
                return [torch.tensor(True)] * len(risks)
            ends = torch.quantile(every, torch.tensor([lower, upper]))
            return [(r >= ends[0]) & (r <= ends[1]) for r in risks]
        among = torch.cat([r[a] for r, a in zip(risks, active, strict=True)]).sort().values
        ends = [among[int(f * len(among)) - 1] if int(f * len(among)) else -1.0 for f in (lower, upper)]
        return [~a | ((r > ends[0]) & (r <= ends[1])) for r, a in zip(risks, active, strict=True)]

    def sizes(self, tensors: Gradients) -> Gradients:
        whole = self.settings.granularity == "tensor"
        return [tensors[i].norm() if whole else tensors[i].abs() for i in self.ranked]

    def first(self, kl: Gradients):
        risks = self.sizes(kl)
        return self.kept(risks, [r > 0 for r in risks], 0.0, self.settings.upper)

    def second(self, grads: Gradients, lower: float = 0.0, upper: float | None = None):
        moments = self.sizes(self.m)
        pairs = zip(self.sizes(grads), moments, strict=True)
        risks = [((1 - self.settings.betas[0]) * g / m - 1).abs() for g, m in pairs]
        return self.kept(risks, [m > 0 for m in moments], lower, upper or self.settings.upper)

    # ---------------------------------------------------------------------------------------- methods

    def gradients(self, loss: Tensor) -> Gradients:
        return list(torch.autograd.grad(loss, self.params, retain_graph=True))

    def rose(self, inputs, labels) -> None:
        """AdamW, R-Drop, ROSE and both."""
        order, r_drop = self.method.order, self.settings.r_drop if self.method.r_drop else 0.0
        two = r_drop > 0 or order in ("first", "ensemble")
        passes = [self.model(**inputs).logits for _ in range(2 if two else 1)]
        ce = sum(F.cross_entropy(x, labels) for x in passes) / len(passes)
        kl = divergence(*passes) if two else ce * 0
        grads = self.clipped(self.gradients(ce + r_drop * kl))
        first = self.first(self.gradients(kl)) if order in ("first", "ensemble") else None
        second = None
        if order in ("second", "ensemble"):
            second = self.second(self.clipped(self.gradients(ce)))
        if order == "ensemble":
            gamma = self.settings.gamma
            pairs = zip(first, second, strict=True)
            mixed = [gamma * f.float() + (1 - gamma) * s.float() for f, s in pairs]
            self.update(grads, self.of_ranked(mixed))
        else:
            masks = first or second
            self.update(grads, self.of_ranked(masks) if masks else self.plain())

    def one_pass(self, inputs, labels) -> Gradients:
        return self.clipped(self.gradients(F.cross_entropy(self.model(**inputs).logits, labels)))

    def draw(self) -> list[Tensor]:
        whole = self.settings.granularity == "tensor"
        shapes = [() if whole else self.params[i].shape for i in self.ranked]
        return [torch.rand(s, generator=self.generator) < self.settings.upper for s in shapes]

    def random_mask(self, inputs, labels) -> None:
        self.update(self.one_pass(inputs, labels), self.of_ranked(self.draw()))

    def fixed_random_mask(self, inputs, labels) -> None:
        if self.t == 0:
            self.mask = self.draw()
        self.update(self.one_pass(inputs, labels), self.of_ranked(self.mask))

    def inverted_mask(self, inputs, labels) -> None:
        grads = self.one_pass(inputs, labels)
        self.update(grads, self.of_ranked(self.second(grads, self.settings.upper, 1.0)))

    def fisher(self) -> None:
        count = self.method.options["fisher_batches"]
        total = [torch.zeros_like(self.params[i]) for i in self.ranked]
        for indices in batches(self.data.lengths, self.settings.batch_size, count, SEED):
            inputs, labels = self.data.batch(indices)
            grads = self.gradients(F.cross_entropy(self.model(**inputs).logits, labels))
            total = [x + grads[i] ** 2 / count for x, i in zip(total, self.ranked, strict=True)]
        if self.settings.granularity == "tensor":
            total = [x.mean() for x in total]
        every = torch.cat([x.reshape(-1) for x in total]).sort(descending=True).values
        self.mask = [x >= every[round(self.settings.upper * len(every)) - 1] for x in total]

    def child_tuning(self, inputs, labels) -> None:
        self.update(self.one_pass(inputs, labels), self.of_ranked(self.mask))

    def smart(self, inputs, labels) -> None:
        options, mask = self.method.options, inputs["attention_mask"]
        words = self.model.words(inputs["input_ids"])
        logits = self.model.after(words, mask)
        delta = (
            torch.empty(words.shape).normal_() * options["noise"] * mask[..., None]
        ).requires_grad_()
        kl = divergence(logits.detach(), self.model.after(words.detach() + delta, mask))
        (grad,) = torch.autograd.grad(kl, delta)
        largest = grad.abs().flatten(1).max(1).values.view(-1, 1, 1)
        radius = options["radius"]
        delta = (delta + options["ascent_rate"] * grad / largest).clamp(-radius, radius)
        delta = delta.detach() * mask[..., None]
        smooth = divergence(logits, self.model.after(words + delta, mask))
        before = copy.deepcopy(self.model).eval()
        for p, q in zip(before.parameters(), self.average, strict=True):
            p.data.copy_(q)
        near = divergence(logits, before(**inputs).logits.detach())
        loss = F.cross_entropy(logits, labels)
        loss = loss + options["smoothness"] * smooth + options["proximal"] * near
        self.update(self.clipped(self.gradients(loss)), self.plain())
        keep = options["momentum"]
        pairs = zip(self.average, self.params, strict=True)
        self.average = [keep * old + (1 - keep) * new.detach() for old, new in pairs]

    def freelb(self, inputs, labels) -> None:
        options, mask = self.method.options, inputs["attention_mask"]
        words = self.model.words(inputs["input_ids"])
        size = (mask.sum(1) * words.shape[2]).sqrt().view(-1, 1, 1)
        delta = torch.empty(words.shape).uniform_(-1, 1) * mask[..., None] * options["magnitude"] / size
        state, grads = torch.get_rng_state(), [torch.zeros_like(p) for p in self.params]
        for _ in range(options["ascent_steps"]):
            torch.set_rng_state(state)
            delta = delta.detach().requires_grad_()
            embedded = self.model.words(inputs["input_ids"]) + delta
            loss = F.cross_entropy(self.model.after(embedded, mask), labels) / options["ascent_steps"]
            grads = [a + b for a, b in zip(grads, self.gradients(loss), strict=True)]
            (ascent,) = torch.autograd.grad(loss, delta)
            delta = delta + options["ascent_rate"] * ascent / ascent.flatten(1).norm(dim=1).view(
                -1, 1, 1
            )
        self.update(self.clipped(grads), self.plain())

    def skipupdate(self, inputs, labels) -> None:
        self._masked_update(inputs, labels, lambda kept: kept / self.method.options["survival"])

    def magma(self, inputs, labels) -> None:
        self._masked_update(inputs, labels, lambda kept: kept * self.scores)

    def _masked_update(self, inputs, labels, factors: Callable[[Tensor], Tensor]) -> None:
        grads = self.one_pass(inputs, labels)
        before = [p.detach().clone() for p in self.params]
        survival = self.method.options["survival"]
        kept = (torch.rand(len(self.ranked), generator=self.generator) < survival).float()
        self.update(grads, self.plain())
        cosines = [F.cosine_similarity(self.m[i].flatten(), grads[i].flatten(), 0) for i in self.ranked]
        if "temperature" in self.method.options:
            found = torch.sigmoid(torch.stack(cosines) / self.method.options["temperature"])
            smoothing = self.method.options["smoothing"]
            self.scores = smoothing * self.scores + (1 - smoothing) * found
        for i, factor in zip(self.ranked, factors(kept), strict=True):
            self.params[i].data.copy_(before[i] + factor * (self.params[i].detach() - before[i]))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Symmetric KL, of the mean over the batch."""
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1).mean()


STEPS = {
    **dict.fromkeys(METHODS, ByHand.rose),
    "random-mask": ByHand.random_mask,
    "fixed-random-mask": ByHand.fixed_random_mask,
    "inverted-mask": ByHand.inverted_mask,
    "child-tuning-d": ByHand.child_tuning,
    "smart": ByHand.smart,
    "freelb": ByHand.freelb,
    "skipupdate": ByHand.skipupdate,
    "magma": ByHand.magma,
}
CASES = [
    (name, granularity)
    for name in METHODS
    for granularity in (("element", "tensor") if has_granularity(name) else ("none",))
]


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_three_steps_are_those_computed_by_hand(name, granularity):
    torch.manual_seed(0)
    model, data = Tiny().train(), Data()
    method = METHODS[name]
    settings = Run(**{**vars(RUN), "granularity": granularity}).settings()
    hand = ByHand(copy.deepcopy(model), method, settings, data)
    if name == "child-tuning-d":
        torch.manual_seed(SEED)
        hand.fisher()
    torch.manual_seed(SEED)
    recipe = method.recipe(model, Context(method, settings, data, RUNTIME, SEED))
    start = [p.detach().clone() for p in model.parameters()]
    for step, indices in enumerate(batches(data.lengths, 4, 3, SEED)):
        inputs, labels = data.batch(indices)
        torch.manual_seed(100 + step)
        STEPS[name](hand, inputs, labels)
        torch.manual_seed(100 + step)
        losses = recipe.backward(inputs, labels)
        recipe.step()
        assert losses.loss.isfinite()
        for (what, p), q, old in zip(model.named_parameters(), hand.params, start, strict=True):
            moved = (q.detach() - old).abs().max()
            difference = (p.detach() - q.detach()).abs().max()
            assert difference <= 1e-3 * moved + 1e-7, (what, step, difference, moved)
    assert all(p.grad is None for p in model.parameters())


def test_authors_eps_is_before_the_bias_correction():
    """Their optimizer's formula, written out: eps is added to the root of the uncorrected v."""
    torch.manual_seed(0)
    model, data = Tiny().train(), Data()
    eps = 1e-3  # as large as roots of second moments are here
    run = Run(**{**vars(RUN), "eps": eps, "eps_placement": "before", "max_grad_norm": 1e9})
    results = {}
    for order in (None, "second"):
        mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
        settings = Run(**{**vars(run), "upper": 1.0}).settings()
        method = Method(order)
        recipe = method.recipe(mine, Context(method, settings, data, RUNTIME, SEED))
        params = list(theirs.parameters())
        m, v = ([torch.zeros_like(p) for p in params] for _ in "mv")
        b1, b2 = settings.betas
        for t, indices in enumerate(batches(data.lengths, 4, 5, SEED), start=1):
            inputs, labels = data.batch(indices)
            torch.manual_seed(t)
            loss = F.cross_entropy(theirs(**inputs).logits, labels)
            for i, (p, g) in enumerate(zip(params, torch.autograd.grad(loss, params), strict=True)):
                m[i] = b1 * m[i] + (1 - b1) * g
                v[i] = b2 * v[i] + (1 - b2) * g**2
                size = settings.lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
                decay = settings.weight_decay if p.dim() > 1 else 0.0
                p.data -= settings.lr * decay * p.data + size * m[i] / (v[i].sqrt() + eps)
            torch.manual_seed(t)
            recipe.backward(inputs, labels)
            recipe.step()
        pairs = zip(mine.parameters(), params, strict=True)
        results[order] = max(float((p - q).detach().abs().max()) for p, q in pairs)
    assert max(results.values()) < 1e-6, results
    # Where torch has it, the same eps gives another result.
    after = Run(**{**vars(run), "eps_placement": "after"}).settings()
    other = copy.deepcopy(model)
    method = Method(None)
    recipe = method.recipe(other, Context(method, after, data, RUNTIME, SEED))
    for t, indices in enumerate(batches(data.lengths, 4, 5, SEED), start=1):
        torch.manual_seed(t)
        recipe.backward(*data.batch(indices))
        recipe.step()
    pairs = zip(other.parameters(), params, strict=True)
    assert max(float((p - q).detach().abs().max()) for p, q in pairs) > 1e-4


def test_inverted_mask_is_the_complement():
    """Of what second-order ROSE would keep, among all that is ranked."""
    torch.manual_seed(0)
    data = Data()
    settings, method = RUN.settings(), METHODS["inverted-mask"]
    recipe = method.recipe(Tiny().train(), Context(method, settings, data, RUNTIME, SEED))
    for indices in batches(data.lengths, 4, 3, SEED):
        recipe.backward(*data.batch(indices))
        recipe.step()
    found = recipe.optimizer.selection["second"]
    assert found.kept == found.ranked - int(0.6 * found.ranked)
