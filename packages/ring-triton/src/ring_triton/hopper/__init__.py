"""Kernels for compute capability 9.0, written in Gluon."""

from ring_triton.hopper.launch import forward, supports

__all__ = ["forward", "supports"]
