"""Parts of bench_training.py: what the existing scripts do in a step, and a clock for both sides."""
