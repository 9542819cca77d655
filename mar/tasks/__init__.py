"""Tasks: from rows of a file, of the hub or of a generator to `Example`s with golds.

Read `registry.py` (the dictionary of tasks), then `loading.py` (what all loaders share), then any
one task; `jsonl.py` is the simplest, `clinic.py` the one whose true posterior is known.
"""
