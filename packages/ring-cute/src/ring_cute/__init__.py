"""Ring attention on kernels in CuTe DSL (compute capability 9.0)."""
