"""The policy: the decoder, where its weights come from, and how they are adapted and sharded.

Read `packing.py` (the layout of the tokens, the token shift), `attention.py` and `model.py` first;
then `weights.py`, `sources.py` (checkpoints), `lora.py`, `critic.py` and `distributed.py`.
"""
