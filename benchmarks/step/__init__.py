"""A whole training step: data, models, loops, and the process that runs one."""
