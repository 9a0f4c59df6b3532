"""Runs compiled Triton kernels on a CPU: an interpreter of the PTX that Triton emits, written from the PTX manual.

It shares nothing with Triton's own interpreter, which runs the kernels' source, nor with the emulator of the CUDA
kernels. ``text`` parses, ``memory`` is global and shared memory with their checks, ``operations`` computes,
``matrices`` are the instructions of tensor cores, ``block`` runs the threads of a block, ``launch`` replaces launches.
"""
