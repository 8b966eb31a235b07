"""Adapters to the libraries that people train with. Each is imported on its own, when it is asked
for."""
