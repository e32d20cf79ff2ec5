"""What is trained: a LoRA or the whole network. Reading, writing, copies, sharding and the record of the base model.

Imports `models` and the rooms below.
"""
