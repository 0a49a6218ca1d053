"""Portable kernels in Triton, which vendors adopt, tune or replace. Core itself imports none of them.

Every family is a module: kernels, and functions that start them through a `Launcher`. A launcher carries the tuning of
one architecture; what it starts is decided by where the arrays are. On a machine without the device, kernels run in
Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported) or are compiled without being run
(`zif.kernels.compilation`).
"""
