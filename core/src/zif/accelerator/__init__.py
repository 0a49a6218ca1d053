"""Parts for devices with memory of their own that torch drives: vendors adopt, tune or replace them.

Core itself imports none of it, and no vendor's name stands in it: torch's module for a device is found through the
device's name. `zif.accelerator.gpu` makes a whole platform of these parts and of `zif.kernels`.
"""
