"""What several experiments share: running a command and keeping its log, tables over seeds.

`commands.py` trains, evaluates and writes logs; `tables.py` reads logs and makes Markdown of
them; `warm_up.py` teaches a language model the answer grammar.
"""
