"""Deterministic simulation of the control plane: real scheduler and block manager, invented time, traffic and faults.

One thread, no array library, no clock but its own: a seed decides everything, and a failure repeats from one command.
"""

from zif.simulation.campaign import Campaign, SimulationFailure, run_campaign, run_scenarios
from zif.simulation.clock import SimulatedClock
from zif.simulation.faults import FaultInjector, FaultPoint, FaultSchedule
from zif.simulation.planner import CostModel, TraceReplay, TraceReport, UsageSample
from zif.simulation.plot import check_plot_path, write_plot
from zif.simulation.plot import summary as trace_summary
from zif.simulation.runner import SimulatedRunner, simulated_layout
from zif.simulation.scenario import Scenario, TrafficShape, draw_scenario, simulated_arena
from zif.simulation.simulation import Simulation
from zif.simulation.sizes import dense_layout, model_arena, plain_arena
from zif.simulation.totals import CheckIntervals, Totals
from zif.simulation.trace import TraceRequest, read_trace
from zif.simulation.words import Words

__all__ = [
    "Campaign",
    "CheckIntervals",
    "CostModel",
    "FaultInjector",
    "FaultPoint",
    "FaultSchedule",
    "Scenario",
    "SimulatedClock",
    "SimulatedRunner",
    "Simulation",
    "SimulationFailure",
    "Totals",
    "TraceReplay",
    "TraceReport",
    "TraceRequest",
    "TrafficShape",
    "UsageSample",
    "Words",
    "check_plot_path",
    "dense_layout",
    "draw_scenario",
    "model_arena",
    "plain_arena",
    "read_trace",
    "run_campaign",
    "run_scenarios",
    "simulated_arena",
    "simulated_layout",
    "trace_summary",
    "write_plot",
]
