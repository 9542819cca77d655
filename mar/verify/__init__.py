"""Is an answer right? Words, mathematics, a judge model, programs in a sandbox.

Read `normaliser.py` (when two spellings are one answer) and `matching.py` (how many golds a list
of answers hits) first, then `verifiers.py` (the dictionary: here a verifier of your own is added).
"""
