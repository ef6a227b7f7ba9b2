"""Tests here and `needed.py` share their cases by name; spawned workers get the parent's sys.path."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
