"""`python -m benchmarks.paper`."""

import argparse
import sys

try:
    from benchmarks.paper import landscape, probing, report, runner, summary, upper
    from rose_ops.finetune import exit_status
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; `make paper` installs what is needed: pip install -e '.[paper]'")


COMMANDS = {
    "run": (runner.add_arguments, runner.run, "train and measure; rows go to the results folder"),
    "report": (report.add_arguments, report.report, "tables and figures as one HTML file"),
    "summary": (summary.add_arguments, summary.summary, "what the study says, as Markdown"),
    "surfaces": (landscape.add_surfaces, landscape.surfaces, "loss around models: Figures 1 and 2"),
    "interpolate": (
        *(landscape.add_interpolation, landscape.interpolate),
        "loss between two models: Figure 4",
    ),
    "probe": (
        *(probing.add_probing, probing.probe),
        "linguistic or superficial features, on MSGS: Figure 3",
    ),
    "dropout": (probing.add_dropout, probing.dropout, "two passes that disagree: Table 4"),
    "upper": (
        *(upper.add_arguments_of_upper, upper.upper),
        "is there a rule for upper that needs no search?",
    ),
}


def main() -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (add_arguments, run, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_arguments(command)
        command.set_defaults(run=run)
    return exit_status(parser.parse_args())


sys.exit(main())
