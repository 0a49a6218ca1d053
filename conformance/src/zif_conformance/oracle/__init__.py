"""What right results are: inputs by dtype, needles, and runs of `zif.reference` in float64 and in declared dtypes.

Called by the suite's tests. Judges nothing (`zif_conformance.gates`) and knows no platform.
"""
