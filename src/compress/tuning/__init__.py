"""What a compressed checkpoint has lost, won back by a little training. Optional: everything else here is one shot.

settings.py    what is asked for: which text, how long, how fast, towards what
structure.py   what of a checkpoint can be trained, and which linears those are
looking.py     everything looked at before the first weight is read
opening.py     the checkpoint in memory, with what is trained in it
texts.py       windows to train on, windows held out, windows of another text
linears.py     a frozen weight and a trained adapter beside it; stored weights held dense
lora.py        LoRA on linears, merged at the end or kept beside
weights.py     the factors, or all weights
adapters.py    the adapters that are there already, beside quantised and sparse weights
losses.py      next tokens, or the dense model's distribution over them, for some tokens at a time
training.py    the loop: steps, looks at the held-out windows, the best state
state.py       where a run is, as tensors and as plain data
writing.py     the tuned folder, of which nothing but what was trained has other bytes
tuner.py       everything in its order: look, train, write, prove, publish
"""
