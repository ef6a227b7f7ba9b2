"""Comparison of ring attention implementations: accuracy, speed, memory."""
