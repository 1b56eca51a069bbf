"""`make gpu` without a GPU: limits, budget, summary, exit status, and what pytest's results become.

Stages are tiny commands, run for real.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import gpu
import gpu_machine
import gpu_stages
import pytest
import torch
from gpu_stages import Run, Stage

PYTHON = [sys.executable, "-c"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    env = {**os.environ, "FOLDER": str(tmp_path)}
    folders = tmp_path / "output", tmp_path / "logs", tmp_path / "results"
    return Run("Of a test", {"device": "none"}, *folders, env)


def stage(name: str, code: str, limit: float = 30.0, **settings) -> Stage:
    return Stage(name, limit, [[*PYTHON, code]], **settings)


def table(run: Run) -> dict[str, dict[str, str]]:
    """The summary for programs, by stage; the one for people has to agree."""
    text = (run.output / "summary.md").read_text()
    with (run.output / "summary.csv").open() as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    for name, row in rows.items():
        assert f"| {name} | {row['result']} |" in text
    return rows


def gone(pid: int) -> bool:
    """Ended, though perhaps nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print("said before", child.pid, os.getpid())
time.sleep(100)
"""


def test_a_limit_ends_everything_that_a_stage_started(run, monkeypatch):
    monkeypatch.setattr(gpu_stages, "GRACE", 0.2)
    start = time.monotonic()
    assert run.stages([stage("slow", STUBBORN, 1.5), stage("next", "print('on')")], 60) == 1
    assert time.monotonic() - start < 20
    rows = table(run)
    assert [rows[name]["result"] for name in ("slow", "next")] == ["timed out", "ok"]
    said = re.search(r"said before (\d+) (\d+)", run.log("slow").read_text())
    assert said, "what it had printed is kept"
    assert all(gone(int(pid)) for pid in said.groups())
    assert "said before" in (run.output / "logs.txt").read_text()


def test_what_a_stage_leaves_running_ends_with_it(run):
    code = "import subprocess, sys; print('child', subprocess.Popen(['sleep', '100']).pid)"
    assert run.stages([stage("leaves", code)], 60) == 0
    assert gone(int(re.search(r"child (\d+)", run.log("leaves").read_text())[1]))


def test_the_summary_is_there_before_and_after_every_stage(run):
    code = "import os; print(open(os.environ['FOLDER'] + '/output/summary.md').read())"
    stages = [stage("first", "print('hello')"), stage("second", code), stage("third", code)]
    assert run.stages(stages, 60) == 0
    seen = run.log("second").read_text()
    assert "# Of a test" in seen
    assert "- device: none" in seen
    assert "| first | ok |" in seen
    assert "| hello |" in seen
    assert "| second | running |" in seen
    assert "| third | not run |" in seen


@pytest.mark.parametrize(
    ("made", "result", "status", "note"),
    [
        (stage("s", "print('fine')"), "ok", 0, "fine"),
        (stage("s", "print('bad'); raise SystemExit(3)"), "failed", 1, "exit status 3: bad"),
        (Stage("s", 9, [["true"], ["false"]]), "failed", 1, "exit status 0, 1: "),
        (stage("s", "print('x | y')", says="^y"), "failed", 1, "its log does not match ^y"),
        (stage("s", "print('a\\nyes\\nb')", says="^y.*"), "ok", 0, "yes"),
        (stage("s", "", needs=["no/such.py"]), "failed", 1, "there is no no/such.py"),
        (stage("s", "", tool="no-such-tool"), "skipped", 0, "there is no no-such-tool on this machine"),
        (
            stage("s", "print('= Device', 'not supported'); raise SystemExit(1)", tool="sh"),
            "skipped", 0, "sh says: = Device not supported",
        ),
        (stage("s", "print('Device', 'not supported'); exit(1)"), "failed", 1, "exit status 1"),
    ],
)  # fmt: skip
def test_how_a_stage_ends(run, made, result, status, note):
    assert run.stages([made], 60) == status
    row = table(run)["s"]
    assert row["result"] == result
    assert note in row["note"]


def test_commands_of_a_stage_run_side_by_side(run):
    """Each waits for the other's file."""
    code = """
import os, sys, time
mine, other = (os.path.join(os.environ["FOLDER"], name) for name in sys.argv[1:])
open(mine, "w")
while not os.path.exists(other):
    time.sleep(0.05)
print("from", sys.argv[1])
"""
    commands = [[*PYTHON, code, "a", "b"], [*PYTHON, code, "b", "a"]]
    assert run.stages([Stage("two", 30, commands)], 60) == 0
    assert re.findall("^from .", run.log("two").read_text(), re.M) == ["from a", "from b"]


def test_stages_without_time_are_not_run(run):
    stages = [stage("long", "import time; time.sleep(50)", 40), stage("late", "print('on')")]
    assert run.stages(stages, 1.5) == 1
    rows = table(run)
    assert (rows["long"]["result"], rows["late"]["result"]) == ("timed out", "not run")
    assert rows["late"]["note"] == "no time was left"
    assert float(rows["long"]["limit"]) <= 2


def test_nothing_is_run_with_a_library_that_was_not_built(run):
    assert run.stages([stage("build", "raise SystemExit(1)"), stage("doctor", "")], 60) == 1
    assert table(run)["doctor"]["note"] == "the build failed"


def test_what_a_stage_wrote_is_copied(run):
    (run.results / "old.csv").write_text("old")
    os.utime(run.results / "old.csv", (1, 1))
    code = "import os; open(os.environ['FOLDER'] + '/results/new.csv', 'w').write('new')"
    assert run.stages([stage("bench", code)], 60) == 0
    assert (run.output / "new.csv").read_text() == "new"
    assert not (run.output / "old.csv").exists()


# ------------------------------------------------------------------------------------ pytest's results

MIXED = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "not equal"
@pytest.fixture
def broken(): raise ValueError("no device")
def test_error(broken): pass
@pytest.mark.skip
def test_skipped(): pass
"""
SLOW = "\ndef test_slow():\n    import time\n    time.sleep(100)\n"


def of_tests(run: Run, text: str, *arguments: str, limit: float = 60.0) -> Stage:
    folder = run.output.parent
    (folder / "test_sample.py").write_text(text)
    junit = run.logs / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull]
    command += [f"--rootdir={folder}", f"--junitxml={junit}", str(folder / "test_sample.py")]
    return Stage("tests", limit, [[*command, *arguments]], junit=junit)


def test_results_of_tests(run):
    assert run.stages([of_tests(run, MIXED)], 60) == 1
    row = table(run)["tests"]
    assert (row["passed"], row["failed"], row["skipped"]) == ("1", "2", "1")
    text = (run.output / "summary.md").read_text()
    assert "- test_sample.py::test_wrong: AssertionError: not equal" in text
    assert "test_sample.py::test_error: " in text
    assert "ValueError: no device" in text


@pytest.mark.parametrize("workers", ["alone", "xdist"])
def test_results_without_a_results_file(run, workers):
    """As they are where pytest was killed."""
    made = of_tests(run, MIXED)
    if workers == "xdist":
        ends = (("PASSED", "a"), ("SKIPPED", "b"), ("FAILED", "wrong"), ("ERROR", "error"))
        log = "\n".join(f"[gw0] [ 25%] {word} test_sample.py::test_{name} " for word, name in ends)
    else:
        log = subprocess.run(
            made.commands[0], cwd=run.output.parent, capture_output=True, text=True
        ).stdout
        log = log[: log.index("= short test summary")]
    counts, failures = gpu_stages.tests(run.logs / "none.xml", log)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert sorted(failures) == ["test_sample.py::test_error", "test_sample.py::test_wrong"]


@pytest.mark.thin(2)
def test_results_of_tests_that_ran_out_of_time(run):
    assert run.stages([of_tests(run, MIXED + SLOW, limit=8)], 60) == 1
    row = table(run)["tests"]
    assert (row["result"], row["passed"], row["failed"]) == ("timed out", "1", "2")
    assert "test_sample.py::test_wrong" in (run.output / "summary.md").read_text()


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("import pytest\n@pytest.mark.skip\ndef test_it(): pass", ()), (MIXED, ("-k", "nothing"))],
    ids=["skipped", "deselected"],
)
def test_no_test_ran(run, text, arguments):
    assert run.stages([of_tests(run, text, *arguments)], 60) == 1
    row = table(run)["tests"]
    assert row["result"] == "failed"
    assert row["note"].startswith("no test ran: ")


def test_only_the_first_failures_are_named(run):
    many = "import pytest\n@pytest.mark.parametrize('i', range(30))\ndef test_it(i): assert i < 0\n"
    run.stages([of_tests(run, many)], 60)
    text = (run.output / "summary.md").read_text()
    assert len(re.findall(r"^- test_sample", text, re.M)) == gpu_stages.NAMED
    assert "- and 10 more" in text


# ------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["parity", "speed"], "no such stage: speed; expected some of build, doctor, contract"),
        (["--limit", "0"], "--limit 0.0: expected seconds, more than 0"),
    ],
)
def test_arguments_that_are_wrong(capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        gpu.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(
        SystemExit, match="PyTorch finds no GPU here; --rehearse runs the stages without"
    ):
        gpu.main(["doctor"])


def test_the_table_has_every_stage_in_order(run):
    facts = {"architecture": "9.0", "seed": "1", "slug": "nvidia-h200"}
    for rehearse in (False, True):
        assert tuple(gpu.table(run, facts, run.output, rehearse)) == gpu.NAMES
    files = set(gpu.table(run, facts, run.output, False)["parity"].commands[0])
    assert {"tests/test_parity.py", "tests/test_ops.py", "tests/test_properties.py"} <= files
    assert "tests/test_gpu.py" not in files


def test_a_run_that_is_told_to_end(tmp_path):
    """The real command, cut off in its first stage: children are gone, and the summary says so."""
    command = [sys.executable, "tests/gpu.py", "doctor", "--rehearse", "--output", str(tmp_path)]
    process = subprocess.Popen(command, cwd=gpu_stages.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("doctor (at most")
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Rehearsal: no GPU" in printed
    assert "| doctor | interrupted |" in (tmp_path / "summary.md").read_text()


# ------------------------------------------------------------------------------- building, and conftest


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_library_says_what_it_was_built_of(tmp_path):
    """As setup.py has it linked."""
    fingerprint = gpu_machine.load_setup().fingerprint()
    library = tmp_path / "library.so"
    build_id = fingerprint + b"sm_80 sm_90 compute_90;".hex()
    command = ["g++", "-shared", "-x", "c++", os.devnull, "-o", library, f"-Wl,--build-id=0x{build_id}"]
    subprocess.run(command, check=True)
    assert gpu_machine.codes(library, fingerprint) == ["sm_80", "sm_90", "compute_90"]
    assert gpu_machine.codes(library, "f" * 40) == []
    assert gpu_machine.codes(tmp_path / "none.so", fingerprint) == []


def test_a_share_of_the_tests(monkeypatch):
    """The same one every time; the others are said to be left out."""
    every = [
        SimpleNamespace(
            nodeid=f"tests/test_ops.py::test[{i}]", path=Path("tests/test_ops.py"),
            add_marker=lambda name: None, get_closest_marker=lambda name: None,
        )
        for i in range(1000)
    ]  # fmt: skip
    left_out: list[SimpleNamespace] = []
    config = SimpleNamespace(
        hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    )
    chosen = []
    for share in ("0.1", "0.1", "1"):
        monkeypatch.setenv("ROSE_TEST_SHARE", share)
        items = list(every)
        conftest.pytest_collection_modifyitems(config, items)
        chosen.append(items)
    assert chosen[0] == chosen[1]
    assert 50 < len(chosen[0]) < 200
    assert len(left_out) == 2 * (1000 - len(chosen[0]))
    assert chosen[2] == every


def test_every_file_has_a_topic():
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert files == conftest.TOPIC_OF.keys()
    assert len(conftest.TOPIC_OF) == sum(len(names.split()) for names in conftest.TOPICS.values())


def test_failures_are_explained_at_once(monkeypatch):
    lines: list[str] = []
    plugins: list[Any] = []
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(register=plugins.append),
        get_terminal_writer=lambda: SimpleNamespace(line=lines.append),
    )
    monkeypatch.delenv("ROSE_TEST_AT_ONCE", raising=False)
    conftest.pytest_configure(config)
    assert not plugins
    monkeypatch.setenv("ROSE_TEST_AT_ONCE", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest.pytest_configure(config)
    for failed, why in ((False, "fine"), (True, "assert 1 == 2")):
        plugins[0].pytest_runtest_logreport(SimpleNamespace(failed=failed, longreprtext=why))
    assert [line.strip() for line in lines] == ["assert 1 == 2"]


def test_a_worker_ends_when_its_device_is_lost(monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest.pytest_runtest_logfinish()
    assert not ended, "it is the only process"
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.pytest_runtest_logfinish()
    assert ended == [1]
