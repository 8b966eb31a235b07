"""Several processes that share a vocabulary or a sequence. Users know it as `fastdpo.parallel`.

- `vocabulary`: under tensor parallelism each process holds rows of the lm_head
- `sequence`: under sequence or context parallelism each holds tokens of every sequence
- `groups`: what processes exchange, and in which order it is added up
"""
