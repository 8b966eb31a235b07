"""Time and memory against `workspace_bytes`."""
