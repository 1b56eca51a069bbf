"""Fine-tuning a real encoder with AdamW and with ROSE, and comparing both: `cli.py` runs it.

`data` reads the tasks, `perturb` makes the noisy copies of the test sentences, `classifier` loads a
model and predicts, `recipes` has the methods and `train` trains by them, `report` turns correct
predictions into intervals, a table and a plot. What they need
beyond torch is an extra, imported where it is used.
"""

import argparse
import importlib
import sys
from typing import Any


class UserError(Exception):
    """Something the user can put right; the message says what was wrong and what to do."""


def exit_status(args: argparse.Namespace) -> int:
    """Run a command, which is `args.run`: 0, 1 for a `UserError`, which is printed, 130 for Ctrl-C."""
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def require(module: str, extra: str = "demo") -> Any:
    """Import an optional dependency, or name the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this command needs {module.partition('.')[0]}, which did not import ({error}); "
            f"install it with: pip install 'rose_ops[{extra}]'"
        ) from error
