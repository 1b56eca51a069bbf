"""Models without the word embeddings that no example uses, which training would only carry along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rose_ops.finetune.classifier import Encoded, Encoder
from rose_ops.finetune.data import Examples


@dataclass(frozen=True)
class Pruned(Encoder):
    """An encoder whose token numbers are those of the smaller vocabulary.

    Attributes:
        numbers: Token number in the tokenizer -> row of the embeddings that are left.
    """

    numbers: dict[int, int]

    def __call__(self, examples: Examples) -> Encoded:
        """As `Encoder`, for examples whose tokens are all in the vocabulary that is left.

        Raises:
            KeyError: They are not: the text was not among what the vocabulary was pruned to.
        """
        encoded = super().__call__(examples)
        for row in encoded.rows:
            row["input_ids"] = [self.numbers[i] for i in row["input_ids"]]
        return encoded


def prune(model: Any, encoder: Encoder, texts: Iterable[Examples]) -> Encoder:
    """Leave those word embeddings that `texts` uses, in place, and return the encoder to use.

    Training is the same but for the weight decay of words that do not occur. The number of the
    padding token, and all below, stay, as models take positions from it.
    """
    pad = encoder.tokenizer.pad_token_id
    used = set(encoder.tokenizer.all_special_ids) | set(range(pad + 1))
    for examples in texts:
        for row in encoder(examples).rows:
            used.update(row["input_ids"])
    kept = sorted(used)
    old = model.get_input_embeddings()
    new = nn.Embedding(len(kept), old.weight.shape[1], padding_idx=old.padding_idx)
    new.weight = nn.Parameter(old.weight.detach()[torch.tensor(kept, device=old.weight.device)].clone())
    model.set_input_embeddings(new)
    model.config.vocab_size = len(kept)
    numbers = {token: row for row, token in enumerate(kept)}
    return Pruned(encoder.tokenizer, encoder.max_length, encoder.device, numbers)
