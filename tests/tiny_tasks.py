"""Tiny tasks and a tiny model, for tests of what fine-tunes."""

from __future__ import annotations

import json

import pytest

POSITIVE = ("a warm and funny film", "clever , moving and bright", "the best thing in years")
NEGATIVE = ("a cold and boring film", "stupid , slow and dull", "the worst thing in years")


def sentences(n, start=0):
    """`n` different labelled sentences."""
    for i in range(start, start + n):
        yield i % 2, f"{(NEGATIVE, POSITIVE)[i % 2][i % 3]} take number {i}"


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_tiny_bert(folder):
    """A randomly initialised BERT with a word-level vocabulary of the sentences above."""
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    words = sorted({w for text in (*POSITIVE, *NEGATIVE) for w in text.split()} | {"take", "number"})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(special) + len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel(config).save_pretrained(folder)


def save_tiny_study(folder):
    """A model, and sst2 with examples of AdvGLUE, as ``benchmarks.paper`` looks for them."""
    save_tiny_bert(folder / "model")
    for name, n, start in (("train", 64, 0), ("dev", 16, 100)):
        write_tsv(folder / "sst2" / f"{name}.tsv", ("label", "sentence"), sentences(n, start))
    (folder / "advglue").mkdir()
    rows = [{"idx": 0, "sentence": "a warm and funny fim take number 5", "label": 1}]
    (folder / "advglue" / "dev.json").write_text(json.dumps({"sst2": rows}))
