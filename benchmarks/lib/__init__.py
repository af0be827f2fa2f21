"""Parts of `benchmarks/accuracy.py`: data, methods, features, measures, report."""
