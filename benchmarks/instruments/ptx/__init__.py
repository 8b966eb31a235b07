"""A machine that executes PTX in numpy, with memory and race checks."""
