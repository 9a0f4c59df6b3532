"""Benchmarks of fastattn: ``python -m benchmarks COMMAND``. See ``benchmarks/README.md``."""
