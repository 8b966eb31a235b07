"""The parts of `python -m benchmarks.step`: data, models, loops, and the process that runs one."""
