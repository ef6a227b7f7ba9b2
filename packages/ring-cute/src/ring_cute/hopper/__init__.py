"""Kernels for compute capability 9.0. Importing the modules here that hold kernels imports the DSL."""
