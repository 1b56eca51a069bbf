"""The Hugging Face Trainer: all orders by `RoseTrainer`, and second order in a plain `Trainer`.

The model is a tiny BERT made from its configuration; nothing is downloaded.

    python examples/trainer.py --order ensemble --accumulate 2
    python examples/trainer.py --plain
"""

import argparse
import tempfile

import torch
import transformers

from rose_ops import RoseFusedAdamW, rose_param_groups
from rose_ops.integrations.transformers import RoseCallback, RoseTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=("first", "second", "ensemble"), default="ensemble")
    parser.add_argument(
        "--upper", type=float, default=0.6, help="fraction of the elements that is kept"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--plain", action="store_true", help="Trainer, with second order")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(99, (64, 9))
    data = [{"input_ids": x, "labels": (x[0] > 49).long()} for x in tokens]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            learning_rate=1e-3,
            num_train_epochs=2,
            gradient_accumulation_steps=args.accumulate,
            max_grad_norm=0.0 if args.plain else 1.0,
            logging_steps=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        if args.plain:
            # The optimizer clips, so that the Trainer (max_grad_norm=0) does not have to.
            optimizer = RoseFusedAdamW(
                rose_param_groups(model), lr=1e-3, upper=args.upper, max_grad_norm=1.0
            )
            trainer = transformers.Trainer(
                model, arguments, train_dataset=data, optimizers=(optimizer, None)
            )
            RoseCallback.add_to(trainer)
        else:
            # Learning rate, weight decay and clipping are those of the arguments.
            trainer = RoseTrainer(
                model, arguments, train_dataset=data, rose={"order": args.order, "upper": args.upper}
            )
        trainer.train()


if __name__ == "__main__":
    main()
