"""Compares the methods with a tuned weighted sum; `benchmarks/run_study.py` is the program."""
