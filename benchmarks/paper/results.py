"""The study's two CSV files, which several processes append to and a stop cannot spoil.

`curves.csv` has a row for each run, evaluation and split, `runs.csv` one for each finished run. Both
are written when a run has finished, under one lock: the curves first, so that a run counts only with
its row in `runs.csv`, and rows of curves without one are orphans. `data.json` says which data the
results of a task are of, by their `digest`.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.paper.runs import Run
from benchmarks.paper.train import Scores, Trained
from rose_ops.finetune import UserError
from rose_ops.finetune.data import Task, digest

SPLITS = ("clean", "adversarial", "characters", "words")
KEY = ("method", "task", "model", "granularity", "seed")
_SCORES = tuple(x.name for x in fields(Scores))
CURVES = ("run", *KEY, "step", "split", *_SCORES)
MACHINE = (
    "machine", "gpu", "cores", "isa", "cpu_flags", "python", "torch", "transformers", "rose_ops",
    "threads", "date", "revision",
)  # fmt: skip
RUNS = (
    "run", *(x.name for x in fields(Run)), *(f"{split}_{x}" for split in SPLITS for x in _SCORES),
    "train_loss", "seconds", "train_seconds", "used_precision", *MACHINE,
)  # fmt: skip


class Results:
    """The files in a folder.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.curves, self.runs = folder / "curves.csv", folder / "runs.csv"
        self.data = folder / "data.json"
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    def finished(self) -> set[str]:
        """The ids of finished runs."""
        with self.locked():
            return {row["run"] for row in read(self.runs)}

    def add(self, run: Run, trained: Trained, seconds: float, machine: Mapping[str, Any]) -> None:
        """Append a finished run. A second row for the same run is not written."""
        key = {"run": run.id, **{name: getattr(run, name) for name in KEY}}
        curve = [
            {**key, "step": evaluation.step, "split": split, **asdict(scores)}
            for evaluation in trained.curve
            for split, scores in evaluation.scores.items()
        ]
        last = {
            f"{split}_{name}": value
            for split, scores in trained.scores.items()
            for name, value in asdict(scores).items()
        }
        tail = trained.history[-25:]
        row = {
            "run": run.id,
            **asdict(run),
            **last,
            "train_loss": sum(x["ce"] for x in tail) / len(tail),
            "seconds": round(seconds, 1),
            "train_seconds": round(trained.seconds, 1),
            **{name: machine.get(name, "") for name in (*MACHINE, "used_precision")},
        }
        with self.locked():
            if run.id not in {row["run"] for row in read(self.runs)}:
                append(self.curves, CURVES, curve)
                append(self.runs, RUNS, [row])

    def drop_orphans(self) -> int:
        """Take rows of unfinished runs out of the curves; returns how many there were."""
        with self.locked():
            known = {row["run"] for row in read(self.runs)}
            return drop(self.curves, lambda row: row["run"] not in known)

    def check_data(self, name: str, task: Task) -> None:
        """Make sure that a task's data are those of the results in the folder. The first are noted.

        Args:
            name: Of the task in the results.
            task: What is about to be trained on.

        Raises:
            UserError: The results are of other data.
        """
        found = digest(task)
        with self.locked():
            known = json.loads(self.data.read_text(encoding="utf-8")) if self.data.exists() else {}
            if name not in known:
                replacement = self.data.with_suffix(".part")
                replacement.write_text(json.dumps({**known, name: found}, indent=2) + "\n")
                replacement.replace(self.data)
            elif known[name] != found:
                raise UserError(
                    f"the results in {self.folder} are of other data of {name} than these: their "
                    f"digest is {known[name]} and not {found}; choose another --results folder, or the "
                    "--data-dir that they were made with"
                )

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether this process is the one to do the run. The claim ends with the block, or with the
        process, however that ends."""
        with (self.folder / "locks" / run.id).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else reads or writes the files of the folder."""
        with (self.folder / "locks" / "files").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; a last line that was cut off is none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def drop(path: Path, unwanted: Callable[[Mapping[str, str]], bool]) -> int:
    """Take rows out of a file, which a stop leaves as it was; returns how many there were."""
    rows = read(path)
    kept = [row for row in rows if not unwanted(row)]
    if len(kept) < len(rows):
        replacement = path.with_suffix(".part")
        replacement.unlink(missing_ok=True)
        append(replacement, rows[0], kept)
        replacement.replace(path)
    return len(rows) - len(kept)


def append(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append all rows, or none, after what a write that was cut off has left is gone.

    Raises:
        UserError: The file has other columns, or the disk has no room for the rows.
    """
    columns = list(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    with path.open("a+b") as file:  # writes go to the end
        file.seek(0)
        before = file.read()
        end = before.rfind(b"\n") + 1
        if end < len(before):
            file.truncate(end)
        if end == 0:
            writer.writeheader()
        elif (header := before[: before.index(b"\n")].decode()) != ",".join(columns):
            raise UserError(
                f"{path} has other columns ({header[:200]}...) than this version writes; choose "
                "another --results folder"
            )
        writer.writerows(rows)
        left = memoryview(text.getvalue().encode())
        try:
            while left:  # a disk that is filling up takes a part, and fails at the next
                left = left[os.write(file.fileno(), left) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise UserError(
                f"{path} could not be written ({error.strerror}), and is as it was before: make room "
                "and give the command again"
            ) from error
