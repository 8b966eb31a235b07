"""Errors against fp64, and the rule that they are held to."""
