"""Is an answer right? Words, mathematics, a judge model, programs in a sandbox.

Read `matching.py` first (the normaliser, and the maximum matching of answers and golds), then
`verifiers.py` (the dictionary: here a verifier of your own is added).
"""
