"""How assets/ is made: the parts of scripts/build_tiny_models.py, one stage or two a file."""
