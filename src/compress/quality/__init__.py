"""How good a checkpoint is: the measures of `evaluation`, taken of one model after another, kept beside it if wanted.

asked.py       what is to be measured, with the documents and problems that takes
subject.py     a checkpoint, looked at before a weight is read
measuring.py   the measures, of a loaded model
saved.py       quality.json
"""
