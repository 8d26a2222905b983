"""Programs that measure mtlopt; run one from the root: `python -m benchmarks.NAME`."""
