"""Benchmarks: `make bench`. Each figure is a ratio to a yardstick measured in the same run."""
