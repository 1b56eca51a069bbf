"""Noisy copies of test sentences: typing errors, and words swapped, doubled or missing.

The noise is that of earlier work: one wrong character inside a word of four letters or more
(Belinkov and Bisk, 2018; Pruthi et al., 2019, who leave the first and the last letter, as people do
when they still want to be understood), and random word edits (Wei and Zou, 2019). These are random
errors, not attacks: they do not look for what fools a model, as AdvGLUE does. A label is taken to
survive them, although a word that goes missing may be the one that carried it.

Written here rather than taken from a library because a comparison needs the same copies in every
process: of what PyPI has, nlpaug draws from the global random states and from sets, whose order
changes with each process, and brings pandas; textnoisr edits characters only and brings `datasets`.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence

_CHARACTER_RATE = 0.3  # of the words with four letters or more
_WORD_RATE = 0.2
_WORD = re.compile(r"[^\W\d_]{4,}")
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def perturb(texts: Sequence[tuple[str, ...]], kind: str, seed: int = 0) -> list[tuple[str, ...]]:
    """A perturbed copy of every text.

    Args:
        texts: One or two sentences each.
        kind: One of `PERTURBATIONS`. `"characters"`: in 30% of the words with four letters or more
            a letter is hit on a neighbouring key, missing, doubled or swapped with the next, the
            first and the last letter excepted. `"words"`: to 20% as many edits as there are words,
            each of which drops or doubles a word or swaps it with the next.
        seed: Another seed draws other errors. A text's errors depend on the seed and its place.

    Returns:
        As many texts, each of as many sentences.
    """
    edit = PERTURBATIONS[kind]
    return [
        tuple(edit(sentence, random.Random(f"{kind}/{seed}/{i}")) for sentence in sentences)
        for i, sentences in enumerate(texts)
    ]


def _characters(sentence: str, generator: random.Random) -> str:
    count = len(_WORD.findall(sentence))
    chosen = generator.sample(range(count), math.ceil(_CHARACTER_RATE * count))
    place = itertools.count()

    def edit(match: re.Match[str]) -> str:
        return _mistype(match[0], generator) if next(place) in chosen else match[0]

    return _WORD.sub(edit, sentence)


def _mistype(word: str, generator: random.Random) -> str:
    i = generator.randrange(1, len(word) - 2)
    before, letter, following, after = word[:i], word[i], word[i + 1], word[i + 2 :]
    neighbours = _neighbours(letter)
    edits = [following, letter + letter + following, following + letter]
    edits += [generator.choice(neighbours) + following] if neighbours else []
    return before + generator.choice(edits) + after


def _neighbours(letter: str) -> str:
    """The keys to the left, to the right, above and below on a QWERTY keyboard."""
    for row, keys in enumerate(_KEYBOARD):
        if (column := keys.find(letter.lower())) >= 0:
            # Each row is shifted to the right of the one above by less than a key.
            nearby = {row - 1: (0, 1), row: (-1, 1), row + 1: (-1, 0)}
            return "".join(
                _KEYBOARD[r][column + shift]
                for r, shifts in nearby.items()
                for shift in shifts
                if 0 <= r < len(_KEYBOARD) and 0 <= column + shift < len(_KEYBOARD[r])
            )
    return ""


def _words(sentence: str, generator: random.Random) -> str:
    words = sentence.split(" ")
    for _ in range(math.ceil(_WORD_RATE * len(words))):
        i = generator.randrange(len(words))
        edit = generator.choice(("drop", "double", "swap"))
        if edit == "double":
            words.insert(i, words[i])
        elif edit == "drop" and len(words) > 1:
            del words[i]
        else:
            words[i : i + 2] = reversed(words[i : i + 2])
    return " ".join(words)


PERTURBATIONS: Mapping[str, Callable[[str, random.Random], str]] = {
    "characters": _characters,
    "words": _words,
}
