"""The same few primitives, once per backend.

contract     what a primitive takes and returns, what a head is
select       which backend serves which primitive
workspace    how large the pieces are
torch        chunked PyTorch: any device, the oracle of the others
triton       the product with its epilogue, and kernels for logits that exist
cuda         CUDA C++ for logits that exist and for the small primitives (csrc/)
"""
