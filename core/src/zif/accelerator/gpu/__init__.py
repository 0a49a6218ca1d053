"""A platform for GPUs that torch drives and Triton compiles for, whoever makes them: vendors subclass `GpuPlatform`.

A vendor brings what only it knows: how its driver lists GPUs and which of them torch will count, which software serves
which architecture, tuning tables, and its library for collectives. Only `device` and `collectives` import torch.
"""
