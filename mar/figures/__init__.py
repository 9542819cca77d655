"""Pictures of runs: figures, and the report page that `mar.report` writes.

Read first: page.py (the report), plots.py (every figure). runs.py reads a run's folder, tables.py
makes the report's tables, report.html is the template.
"""
