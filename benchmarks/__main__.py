"""``python -m benchmarks``."""

import sys

try:
    from benchmarks.run import main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; `make bench` installs what is needed: pip install -e '.[bench]'")

sys.exit(main())
