"""What a completion must say, how it is asked for, and what it earns: no tensors, no model.

Read `grammar.py` first (the tags, and the incremental parser), then `rewards.py` (the objectives
of the paper, split into components) and `reward_terms.py` (what they and others are made of);
`prompts.py` holds the wording of the request.
"""
