"""On-policy: prompts are sampled by the policy, judged, and turned into groups to train on.

Imports `scorers` and the rooms below, and `samplers`.
"""
