"""Measuring answers: every metric, its interval, and what it can be compared with.

Read first: answer_sets.py (what is measured), metrics.py (every metric), README.md (the glossary).
Then bootstrap.py (intervals), bounds.py (floor and ceiling), baselines.py (what a policy is compared
with), held_out.py (how a run measures itself).
"""
