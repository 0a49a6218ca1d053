"""Executable semantics of ops and attention, in plain torch: specification, oracle of the tests, and fallback.

Import the submodules; this package imports no array library by itself. Called by platforms, models and conformance.
"""
