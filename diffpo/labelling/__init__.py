"""Preferences by scorers in place of people: pictures to pairs, rankings or likes that training reads.

Imports `evaluation` (pictures and their scores) and the rooms below it.
"""
