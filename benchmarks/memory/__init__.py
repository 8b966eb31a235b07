"""The memory of a step: measured (`extra`), and counted without a GPU."""
