"""Noisy copies of test sentences: typing errors, misspelt, swapped and missing words.

The edits are those of nlpaug, chosen because it knows the keyboard and a dictionary of real
misspellings and needs no download. It draws from the global random states, so each sentence is
edited under a seed of its own, made from the sentence's place, and the states are put back: the
same seed gives the same copies, whatever was drawn before.

These are random errors, not attacks: they do not look for what fools a model, as AdvGLUE does. A
label is taken to survive them, although a deleted word may be the one that carried it.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from rose_ops.finetune import require

PERTURBATIONS = ("characters", "words")

_CHARACTER_WORDS = 0.3  # share of the words (of four letters or more) with one wrong character
_MISSPELT_WORDS = 0.3
_SWAPPED_WORDS = 0.3
_DELETED_WORDS = 0.15


def perturb(texts: Sequence[tuple[str, ...]], kind: str, seed: int = 0) -> list[tuple[str, ...]]:
    """A perturbed copy of every text, by one of the edits of `kind` drawn for each example.

    Args:
        texts: One or two sentences each.
        kind: `"characters"`: a neighbouring key, or a letter swapped, inserted or deleted, in 30%
            of the longer words. `"words"`: 30% of the words misspelt, 30% swapped with a
            neighbour, or 15% deleted.
        seed: Another seed draws other edits.

    Returns:
        As many texts, each of as many sentences. A sentence that an edit does not apply to (no
        longer word, say) stays as it is.
    """
    edits = _edits()[kind]

    def apply(edit: Callable[[str], list[str]], sentence: str) -> str:
        # nlpaug gives a list of one, and an empty one for an empty sentence
        return next(iter(edit(sentence)), sentence) or sentence

    perturbed = []
    for i, sentences in enumerate(texts):
        with _seeded(f"{kind}/{seed}/{i}"):
            edit = random.choice(edits)
            perturbed.append(tuple(apply(edit, sentence) for sentence in sentences))
    return perturbed


def _edits() -> Mapping[str, Sequence[Callable[[str], list[str]]]]:
    char = require("nlpaug.augmenter.char")
    word = require("nlpaug.augmenter.word")
    # Splitting at spaces and nowhere else leaves the text around an edit as it was.
    tokens = {"tokenizer": str.split, "reverse_tokenizer": " ".join}
    letters = {"include_numeric": False, "include_upper_case": False}
    letters |= {"aug_word_p": _CHARACTER_WORDS, "aug_char_max": 1, "aug_word_max": None} | tokens
    anywhere = {"aug_max": None} | tokens
    return {
        "characters": [
            char.KeyboardAug(include_special_char=False, **letters).augment,
            char.RandomCharAug(action="insert", spec_char="", **letters).augment,
            char.RandomCharAug(action="swap", spec_char="", **letters).augment,
            char.RandomCharAug(action="delete", spec_char="", **letters).augment,
        ],
        "words": [
            word.SpellingAug(aug_p=_MISSPELT_WORDS, **anywhere).augment,
            word.RandomWordAug(action="swap", aug_p=_SWAPPED_WORDS, **anywhere).augment,
            word.RandomWordAug(action="delete", aug_p=_DELETED_WORDS, **anywhere).augment,
        ],
    }


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seed the global random states and put them back."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
