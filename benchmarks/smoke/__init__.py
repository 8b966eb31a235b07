"""First light on a device: does each kernel compile and run, how wrong is it, how fast."""
