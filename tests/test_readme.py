"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=["second-order", "ensemble"])
def test_example_runs(source: str) -> None:
    names: dict = {}
    exec(compile(source, str(README), "exec"), names)
    optimizer = names["optimizer"]
    assert all(state["step"].item() == 10 for state in optimizer.state.values())
    assert 0 < optimizer.selection["second"].kept < optimizer.selection["second"].ranked
