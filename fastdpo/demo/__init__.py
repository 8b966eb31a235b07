"""`fastdpo demo`: a small DPO run from end to end, from preference pairs to a saved model.

options     what can be asked for, checked before anything starts
pairs       preference pairs, and reading them from a file
synthetic   ... and making them: questions with good and flawed answers
model       a tokenizer and a model, made or loaded
collate     pairs to token ids to batches
setting     the options, and what they came to
train       the two loops: a little pre-training, then DPO
evaluate    how often the model prefers the better answer
memory      what one step needs, and what eager PyTorch needs for it
plot        the picture
report      the tables
output      a directory that appears at once or not at all
run         all of it in order
"""
