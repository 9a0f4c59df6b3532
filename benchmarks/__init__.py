"""Benchmarks of fastattn: ``python -m benchmarks ops|model|overhead|report|gpu``. See ``benchmarks/README.md``."""
