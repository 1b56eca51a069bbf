"""The published settings of ROSE: learning rate and upper threshold for each order, task and size.

They go with RoBERTa, tensor granularity, betas (0.9, 0.98), lower 0, ten epochs. Source: the authors'
appendix and scripts (https://github.com/jiangllan/ROSE).
"""

# order -> task -> (lr, upper) for RoBERTa-base and -large
PUBLISHED = {
    "first": {
        "qnli": ((2e-5, 0.70), (3e-5, 0.50)),
        "qqp": ((2e-5, 0.70), (2e-5, 0.70)),
        "rte": ((4e-5, 0.80), (1e-5, 0.80)),
        "sst2": ((2e-5, 0.60), (4e-5, 0.70)),
    },
    "second": {
        "qnli": ((1e-5, 0.40), (1e-5, 0.50)),
        "qqp": ((1e-4, 0.60), (1e-5, 0.60)),
        "rte": ((4e-5, 0.60), (2e-5, 0.50)),
        "sst2": ((1e-4, 0.30), (1e-5, 0.50)),
    },
    "ensemble": {
        "qnli": ((1e-5, 0.90), (1e-5, 0.30)),
        "qqp": ((5e-5, 0.75), (1e-5, 0.80)),
        "rte": ((4e-5, 0.80), (1e-5, 0.85)),
        "sst2": ((5e-5, 0.40), (1e-5, 0.70)),
    },
}
PUBLISHED_GAMMA = 0.5


def candidates(order: str, task: str) -> list[tuple[float, float]]:
    """The distinct (lr, upper) of an order, those of the task first: what to try without a search."""
    tasks = sorted(PUBLISHED[order], key=lambda x: x != task)
    return list(dict.fromkeys(preset for x in tasks for preset in PUBLISHED[order][x]))
