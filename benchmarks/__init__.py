"""One script per question. Run from the repository's root, such as ``python -m benchmarks.loading --help``."""
