"""Open an engine for a command, saying on stderr what takes time and what was decided."""

from typing import TYPE_CHECKING

from zif.cli.terminal import StartProgress, held_as, note
from zif.contract import format_bytes
from zif.engine.garbage import collection_paused
from zif.settings import EngineSettings

if TYPE_CHECKING:
    from zif.engine.llm import LLM


def open_llm(settings: EngineSettings) -> "LLM":
    """Return an engine that is ready for requests. The caller closes it."""
    progress = StartProgress()
    progress("importing the engine", 0, 1)
    with collection_paused():
        from zif.engine.llm import LLM

    progress("importing the engine", 1, 1)
    llm = LLM.from_settings(settings, progress)
    note(
        f"{llm.model.architecture} ({llm.model.implementation}, {held_as(llm.model)}) on {llm.plan.platform} "
        f"{llm.plan.device_id}: weights {format_bytes(llm.plan.memory.weight_bytes)}, "
        f"KV {format_bytes(llm.arena.num_bytes)}"
    )
    return llm
