"""The parts of `python -m benchmarks.loader`."""
