"""Compiled kernels as a platform shows them, so that their quality can be judged where the device is not."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel in one configuration that the platform ships, compiled for one architecture.

    `num_spills` counts registers that found no room (or the instructions that move them, where the compiler tells only
    these); `max_spills` is what the platform states as bearable there. Matrix instructions and loads of 16 bytes are
    counted in the binary; they are needed where the flags say so: where the kernel multiplies matrices, and where it
    walks over keys and values. `shared_bytes` is on-chip memory that one program takes, of what it may take at most.
    """

    name: str
    architecture: str
    num_matrix_instructions: int
    needs_matrix_instructions: bool
    num_spills: int
    max_spills: int
    num_wide_loads: int
    needs_wide_loads: bool
    shared_bytes: int
    max_shared_bytes: int
