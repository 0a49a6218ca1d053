"""Parts of `benchmarks/cpu.py`: peers in environments of their own, the traffic, the clocks and the report.

`engine_*.py` and what they import run in a peer's environment and know the standard library and that peer only; the
others run beside zif. Environments, accounts of processes, percentiles and tables serve the benchmarks of the server
too. Nothing here is part of a distribution.
"""
