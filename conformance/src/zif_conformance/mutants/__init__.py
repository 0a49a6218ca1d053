"""The suite is itself tested: seeded faults of the reference platform that it must kill, and variants that must pass.

A mutant is data: a few lines of the reference platform's source, and what stands there instead. `bank` lists all,
`patching` applies them, `trial` runs the suite's tests against them. No fault is ever made in core, or in a vendor's
plugin.
"""
