"""Tools for developing the CUDA kernels: a model of their time, and how evenly their schedulers share out work."""
