"""A run around the algorithm: configuration, folder, checkpoints, signals, console, closing table.

Read `setup.py` first (what a run is made of), then `checkpoint.py` and `resume.py`.
"""
