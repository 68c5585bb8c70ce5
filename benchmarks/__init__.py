"""Programs that measure; their results are under benchmarks/results."""
