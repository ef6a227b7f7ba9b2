"""Ranks, seeds and markers for the tests of ring-core."""

pytest_plugins = ["ring_core.testing.plugin"]
