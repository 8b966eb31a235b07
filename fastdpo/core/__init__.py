"""One training step, read from top to bottom. Users come in by `fastdpo.loss`.

call        the options of a call, each listed once, travelling whole
checks      what bad input gets
rows        which positions carry loss, and whose sequence they are
step        tokens, reference, sequences, objective: the way through
operator    the one autograd.Function over the schedule, and its operators for tracers
linear      the schedule, with its equations
row_state   what it knows of a row
products    what a matrix product is summed in
statistics  a row's statistics, of its sums
entropy     the gradient where the entropy enters the loss
logits      the same for logits that exist already
sequences   sums over sequences, and the sigmoid loss fused with them
results     what comes back
autograd    what the autograd functions share
"""
