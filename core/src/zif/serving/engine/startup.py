"""What the client must know of a model that is open."""

from pathlib import Path

from zif.contract import KVArena
from zif.engine.inputs import eos_token_ids
from zif.engine.llm import LLM
from zif.serving.answers import ModelInfo
from zif.settings import EngineSettings


def model_info(llm: LLM, settings: EngineSettings, name: str) -> ModelInfo:
    """Return what the client must know of an open model."""
    group = max(range(len(llm.arena.groups)), key=lambda index: _num_blocks(llm.arena, index))
    return ModelInfo(
        name=name,
        folder=str(Path(settings.tokenizer or settings.model).resolve()),
        max_model_len=llm.model.max_model_len,
        vocab_size=llm.model.vocab_size,
        eos_token_ids=sorted(eos_token_ids(llm.model, llm.engine.vocabulary)),
        num_kv_blocks=_num_blocks(llm.arena, group),
        block_size=llm.arena.groups[group].spec.block_size,
        max_num_seqs=settings.max_num_seqs,
        platform=llm.plan.platform,
        default_sampling=llm.get_default_sampling_params(),
        pooling=llm.engine.pooler.abilities,
    )


def _num_blocks(arena: KVArena, group: int) -> int:
    """Count the blocks that a layer group would have if it had the whole arena."""
    return arena.num_cells(group) - len(arena.slab_blocks(group, 0))
