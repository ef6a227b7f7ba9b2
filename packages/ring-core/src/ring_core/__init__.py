"""Ring attention: one sequence attended to by several ranks."""
