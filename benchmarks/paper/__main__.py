"""`python -m benchmarks.paper`."""

import argparse
import sys

try:
    from benchmarks.paper import runner
    from rose_ops.finetune import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; `make paper` installs what is needed: pip install -e '.[paper]'")


def main() -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("run", help="train and measure; rows go to the results folder",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    runner.add_arguments(command)
    command.set_defaults(run=runner.run)
    args = parser.parse_args()
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


sys.exit(main())
