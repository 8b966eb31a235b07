"""What is timed, against whom, and the results with the hardware they came from.

python -m benchmarks.smoke      does each kernel run, is it right, how fast: the first on a GPU
python -m benchmarks.loss       the DPO loss step against every peer that runs here
python -m benchmarks.workspace  time and memory against `workspace_bytes`
python -m benchmarks.accuracy   log-probabilities and gradients against fp64
python -m benchmarks.kernels    each primitive against its floor
python -m benchmarks.step       a whole training step of a Hugging Face model
python -m benchmarks.memory     the memory of a step at real sizes, counted without a GPU
python -m benchmarks.report     docs/benchmarks.md and the README's table from the others' JSON
benchmarks/gpu.sh OUT           all of it on a GPU, within a time budget

A folder a kind: `command.py` is what `python -m` runs, `shown.py` what it prints, writes and draws.
"""
