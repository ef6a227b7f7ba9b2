"""`python -m ring_compare`: the same command, for launchers such as torchrun that want a module."""

import sys

from ring_compare.cli import main

# Worker processes import this module again under another name; only the first one runs the command.
if __name__ == "__main__":
    sys.exit(main())
