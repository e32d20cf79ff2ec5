"""The parts of `scripts/bench_calibrated.py`, one file each."""
