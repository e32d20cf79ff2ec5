"""The parts of `scripts/bench_samplers.py`, one file each."""
