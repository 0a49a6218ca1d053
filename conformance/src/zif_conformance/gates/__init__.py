"""The gates G0 to G7: what a result must keep to count as right. Tolerances belong here, never to a test or a vendor.

One file per gate. Each is a pure function of results and expectations that returns a `GateResult`; `hold` records and
asserts it. Called by the suite's tests; imports no platform.
"""

from zif_conformance.gates.exact import GuardedTensor, exact, guarded
from zif_conformance.gates.model import model_divergence, model_top1
from zif_conformance.gates.nmse import NMSE_LIMITS, nmse, nmse_of_rows
from zif_conformance.gates.ratio import ratio, tolerance
from zif_conformance.gates.result import GateResult, hold
from zif_conformance.gates.scaling import borders, scaling
from zif_conformance.gates.specials import specials
from zif_conformance.gates.structure import proof, prove
from zif_conformance.gates.ulp import ulp

__all__ = [
    "NMSE_LIMITS",
    "GateResult",
    "GuardedTensor",
    "borders",
    "exact",
    "guarded",
    "hold",
    "model_divergence",
    "model_top1",
    "nmse",
    "nmse_of_rows",
    "proof",
    "prove",
    "ratio",
    "scaling",
    "specials",
    "tolerance",
    "ulp",
]
