"""Measuring answers: every metric, its interval, and what it can be compared with.

Read first: answer_sets.py (what is measured), metrics.py (every metric), README.md (the glossary).
Then bootstrap.py (intervals), bounds.py (floor, ceiling), held_out.py and step_metrics.py (how a
run measures itself), baselines.py and comparison.py (what `mar.evaluate` compares).
"""
