"""Align image diffusion models with preferences. Each folder is a room; `tests/test_rooms.py` lists their order."""
