"""A classifier: loaded with its tokenizer, examples made into its inputs, and what it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rose_ops.finetune import UserError, require
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.runtime import Runtime

# Few different lengths, so that the kernels a library prepares for a shape are used again.
_PAD_TO_MULTIPLE_OF = 8
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """Turns examples into model inputs."""

    tokenizer: Any
    max_length: int
    device: torch.device

    def __call__(self, examples: Examples) -> "Encoded":
        """Tokenise examples, cutting them at `max_length`."""
        columns = [list(column) for column in zip(*examples.texts, strict=True)]
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        rows = [{name: tokens[name][i] for name in tokens} for i in range(len(examples))]
        return Encoded(self, rows, torch.tensor(examples.labels))


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, padded batch by batch."""

    encoder: Encoder
    rows: list[dict[str, list[int]]]
    labels: Tensor

    @property
    def lengths(self) -> list[int]:
        """Length of each example in tokens, special tokens included."""
        return [len(row["input_ids"]) for row in self.rows]

    def batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """Inputs and labels of some examples, on the encoder's device."""
        inputs = self.encoder.tokenizer.pad(
            [self.rows[i] for i in indices],
            pad_to_multiple_of=_PAD_TO_MULTIPLE_OF,
            return_tensors="pt",
        )
        device = self.encoder.device
        return inputs.to(device), self.labels[list(indices)].to(device)


def load_model(name: str, task: Task, max_length: int, seed: int, runtime: Runtime) -> Any:
    """A pre-trained encoder with a new classifier (made from `seed`), and its tokenizer.

    Args:
        name: A folder, or a model on the Hugging Face hub.
        task: Gives the labels.
        max_length: Longer inputs are cut.
        seed: Seeds the classifier's initial weights.
        runtime: Where the model goes.

    Returns:
        The model and an `Encoder`.
    """
    transformers = require("transformers")
    torch.manual_seed(seed)
    names = dict(enumerate(task.labels))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=len(names),
            id2label=names,
            label2id={label: i for i, label in names.items()},
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"could not load the model {name!r}: {error}\n--model takes a folder with a Hugging "
            "Face checkpoint and its tokenizer, or the name of one on the hub"
        ) from error
    if tokenizer.pad_token is None:  # decoders are often trained without padding
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(runtime.device), Encoder(tokenizer, max_length, runtime.device)


@torch.inference_mode()
def predict(model: nn.Module, data: Encoded, runtime: Runtime) -> Tensor:
    """Logits of the examples, in their order: float32 `[n, classes]`, on the CPU."""
    model.eval()
    order = sorted(range(len(data.rows)), key=data.lengths.__getitem__)
    found = []
    for i in range(0, len(order), _EVALUATION_BATCH):
        inputs, _ = data.batch(order[i : i + _EVALUATION_BATCH])
        with runtime.autocast():
            found.append(model(**inputs).logits.float().cpu())
    logits = torch.empty(len(order), found[0].shape[1])
    logits[order] = torch.cat(found)
    return logits


def correct(model: nn.Module, data: Encoded, runtime: Runtime) -> list[bool]:
    """Whether the model's prediction is right, example by example."""
    right = predict(model, data, runtime).argmax(dim=-1) == data.labels
    return [bool(x) for x in right]
