"""What the speed benchmarks share: paired timing, the machine's facts, files."""
