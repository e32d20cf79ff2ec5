"""Pictures of two arms, their scores, statistics and the report.

Imports `rollout`, `scorers` and the rooms below them.
"""
