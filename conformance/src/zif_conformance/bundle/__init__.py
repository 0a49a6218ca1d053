"""The bundle of a run: its result with a JSON Schema, what people read, and what re-checks it off line.

Written and read by `zif_conformance.command`; runs no test and loads no platform.
"""
