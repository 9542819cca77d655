"""From rollouts to optimizer steps.

Read in the order of the data: `batch.py` (tensors), `advantages.py` (credit), `losses.py`,
`update.py` (the steps). `learner.py` holds the models that take part.
"""
