"""Ring attention on our own kernels in CUTLASS CuTe DSL, for compute capability 9.0.

Importing it imports neither the DSL nor a kernel; `CuteBackend().capabilities(device)` says what runs there and what is
missing. So far there are forwards only, which is why no entry point makes it a backend that is found by itself:
`ring_core.backend.register_backend("cute", CuteBackend())` does.
"""

from ring_cute.backend import CuteBackend

__all__ = ["CuteBackend"]
