"""The parts of `python -m benchmarks.training`."""
