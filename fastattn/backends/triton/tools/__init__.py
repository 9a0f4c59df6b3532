"""Tools for developing the Triton kernels: compile gates without a GPU, and tuning on one."""
