"""The paper's comparison, with controls: `python -m benchmarks.paper`."""
