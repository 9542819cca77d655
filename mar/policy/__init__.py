"""The policy: the decoder, where its weights come from, and how they are adapted and sharded.

Read `attention.py` (the layout of a batch's tokens) and `model.py` first; then `weights.py` and
`sources.py` (checkpoints), `lora.py` (adapters), `critic.py` (values), `distributed.py`. A model
family is an entry of ARCHITECTURES in `families.py`, which says how to add one.
"""
