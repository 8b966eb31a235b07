"""Instruments: they show on a CPU what kernels and schedules do on a GPU. Not part of the wheel.

    fake_gpu         tensors that say they lie on a GPU: what waits, is allocated, is executed
    ahead_of_time    Triton's kernels compiled for GPUs that are not here: registers, spills
    ptx              executes PTX, Triton's and the CUDA C++ kernels', and checks memory and races
    host             runs the CUDA C++ sources on a CPU: blocks in turn, threads as fibers

docs/correctness.md says what each can and cannot see. Their tests, and the tests that run on them,
are in tests/instruments.
"""
