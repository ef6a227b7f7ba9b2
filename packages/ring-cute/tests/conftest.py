"""Nothing here runs a kernel: they are compiled, in processes of their own. On a GPU: gpu_probe.py."""

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
