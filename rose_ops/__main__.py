"""`python -m rose_ops`."""

import sys

from rose_ops.cli import main

sys.exit(main())
