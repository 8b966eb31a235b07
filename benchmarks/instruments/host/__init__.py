"""csrc/ compiled by g++ over a stand-in for the CUDA runtime, and behind the CUDA backend."""
