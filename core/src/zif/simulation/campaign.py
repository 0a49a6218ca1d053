"""Many scenarios in a row, over several processes: random traffic until a number of steps is done or a promise breaks.

A campaign of seed s runs the scenarios s, s + 1, s + 2, ... So a scenario that fails is the first one of the campaign
that has its seed, and one command repeats it.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context

from zif.errors import EngineError
from zif.simulation.faults import FaultSchedule
from zif.simulation.scenario import VOCAB_SIZE, draw_scenario
from zif.simulation.simulation import Simulation
from zif.simulation.totals import CheckIntervals, Totals
from zif.simulation.words import Words

_CHUNK_STEPS = 25_000
_CHUNK_SEEDS = 1_000_000
"""Distance between the first seeds of chunks: no chunk reaches the next one's seeds."""

CampaignProgress = Callable[[Totals], None]
"""Called with the totals so far."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """What to run. `faults` is the text of a `FaultSchedule`; "random" draws one for each scenario."""

    seed: int
    num_steps: int
    faults: str = "random"
    num_workers: int = 1
    intervals: CheckIntervals = field(default_factory=CheckIntervals)

    def replay_command(self, seed: int, num_steps: int) -> str:
        """Return the command line that repeats one scenario up to a step."""
        command = f"zif simulate --seed {seed} --steps {num_steps}"
        return command if self.faults == "random" else f"{command} --faults {self.faults}"


class SimulationFailure(EngineError):
    """A promise of the control plane was broken; the message says which, and how to see it again."""


def run_campaign(campaign: Campaign, on_progress: CampaignProgress = lambda totals: None) -> Totals:
    """Run a campaign and return what it met; the same for any number of workers.

    Raises `SimulationFailure` at the first broken promise, `ConfigError` on a fault that does not exist.
    """
    FaultSchedule.parse(campaign.faults, campaign.seed)
    chunks = _chunks(campaign)
    totals = Totals()
    if campaign.num_workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            totals += run_scenarios(chunk)
            on_progress(totals)
        return totals
    with ProcessPoolExecutor(campaign.num_workers, mp_context=get_context("spawn")) as pool:
        pending: set[Future[Totals]] = {pool.submit(run_scenarios, chunk) for chunk in chunks}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    totals += future.result()
                on_progress(totals)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return totals


def run_scenarios(campaign: Campaign) -> Totals:
    """Run scenarios one after the other, in this process, until the steps are used up."""
    totals, words, seed = Totals(), Words(VOCAB_SIZE), campaign.seed
    while totals.num_steps < campaign.num_steps:
        faults = FaultSchedule.parse(campaign.faults, seed)
        simulation = Simulation(draw_scenario(seed), faults, words, campaign.intervals)
        try:
            totals += simulation.run(campaign.num_steps - totals.num_steps)
        except Exception as error:
            # Whatever a broken control plane raises, the answer is the same: how to see it again.
            raise SimulationFailure(
                f"{type(error).__name__}: {error} (scenario {seed}, step {simulation.num_steps}); replay with: "
                f"{campaign.replay_command(seed, simulation.num_steps)}"
            ) from error
        seed += 1
    return totals


def _chunks(campaign: Campaign) -> list[Campaign]:
    """Cut a campaign into parts of a bounded number of steps, each with seeds of its own."""
    starts = range(0, campaign.num_steps, _CHUNK_STEPS)
    return [
        Campaign(
            campaign.seed + index * _CHUNK_SEEDS,
            min(_CHUNK_STEPS, campaign.num_steps - start),
            campaign.faults,
            intervals=campaign.intervals,
        )
        for index, start in enumerate(starts)
    ]
