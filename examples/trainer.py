"""Second-order ROSE in the Hugging Face Trainer, with a tiny BERT made from a configuration.

For the other orders there is rose_ops.integrations.transformers.RoseTrainer.

pip install transformers accelerate
python examples/trainer.py --epochs 5
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import transformers

from rose_ops import RoseFusedAdamW, rose_param_groups

VOCABULARY, LENGTH = 50, 12


def examples(count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
    """Sequences of tokens; the label says in which half of the vocabulary the first one is."""
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    labels = tokens[:, 0] >= VOCABULARY // 2
    return [{"input_ids": a, "labels": b} for a, b in zip(tokens, labels.long(), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--upper", type=float, default=0.6, help="fraction of the parameters to update")
    parser.add_argument("--output", help="folder for checkpoints; a temporary one if not given")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    transformers.set_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    train, test = examples(512, generator), examples(128, generator)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
    )
    optimizer = RoseFusedAdamW(
        rose_param_groups(model, weight_decay=0.01),
        lr=5e-3,
        upper=arguments.upper,
        max_grad_norm=1.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                arguments.output or folder,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=32,
                max_grad_norm=0,  # the optimizer clips, without a pass of its own
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_steps=8,
                save_strategy="epoch" if arguments.output else "no",
                report_to=[],
                seed=arguments.seed,
            ),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
            },
            optimizers=(optimizer, None),  # None: the Trainer's own learning-rate schedule
        )
        trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    found = optimizer.selection["second"]
    print(f"kept {found.kept / found.ranked:.1%} of {found.ranked.item()} parameters")


if __name__ == "__main__":
    main()
