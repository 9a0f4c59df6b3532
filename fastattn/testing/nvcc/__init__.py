"""Runs the CUDA kernels on a CPU from the PTX that nvcc emits, with the interpreter of what Triton emits.

``clocks`` is shared memory with barriers and the order of events, ``maps`` are tensor maps, ``group`` runs a warpgroup
and ``machine`` the warpgroups of a block, ``launch`` stands in for the library. It is written from the PTX manual alone
and shares nothing with ``csrc/emulator``, which runs the kernels' source.
"""
