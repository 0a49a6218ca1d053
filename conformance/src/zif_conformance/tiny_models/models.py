"""The tiny models of one run of the suite: made once, opened through `zif.LLM` on the platform under test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from zif import LLM, RequestOutput, SamplingParams
from zif.contract import Feature
from zif.errors import EngineError, PlanRefusedError
from zif_conformance.gates.result import Record
from zif_conformance.marks import exercises
from zif_conformance.subject import Subject, block_size, preferred_dtype
from zif_conformance.tiny_models.checkpoints import FAMILIES, kv_token_bytes, write_checkpoint
from zif_conformance.tiny_models.truth import Truth

MAX_MODEL_LEN = 96
"""The least context of an engine. Large blocks need more."""
_CONTEXT_BLOCKS = 4
_CONTEXT_MARGIN = 64
_KV_BYTES = 16 << 20
_NUM_CONTEXTS = 24
_SMALLEST_KV_BYTES = 4096
# Copies cost nothing and prompts much, so that who loses its blocks is swapped.
_HOST = {"host_kv_bytes": 16 << 20, "host_kv_bytes_per_s": 1 << 50, "prefill_tokens_per_s": 1}


class TinyModels:
    """Checkpoints under `root`, shaped by the claims of the platform under test."""

    def __init__(self, root: Path, subject: Subject) -> None:
        self._root = root
        self._subject = subject
        self.capabilities = subject.device_info().capabilities
        self.dtype = preferred_dtype(self.capabilities)
        self.block_size = block_size(self.capabilities, 8)
        # So many blocks that what the tests do at borders of blocks fits.
        self.max_model_len = max(MAX_MODEL_LEN, _CONTEXT_BLOCKS * self.block_size + _CONTEXT_MARGIN)
        self._truths: dict[str, Truth] = {}

    def folder(self, family: str) -> Path:
        """Return the family's checkpoint."""
        folder = self._root / family
        return folder if folder.exists() else write_checkpoint(family, folder, self.capabilities)

    def truth(self, family: str, kv_dtype: str | None = None) -> Truth:
        """Return what Transformers makes of the family, with KV of that dtype or the model's own."""
        name = f"{family} {kv_dtype}"
        if name not in self._truths:
            self._truths[name] = Truth.of(self.folder(family), self.dtype, kv_dtype)
        return self._truths[name]

    def settings(self, model: Path, **changes: Any) -> dict[str, Any]:
        """Return the settings of a small engine."""
        small = {
            "model": str(model),
            "platform": self._subject.name,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "block_size": self.block_size,
            "kv_bytes": self._kv_bytes(),
            "enable_prefix_caching": Feature.PREFIX_CACHING in self.capabilities.features,
        }
        return small | changes

    def open(self, family: str, **changes: Any) -> LLM:
        """Open the family's model on the platform under test."""
        return LLM(**self.settings(self.folder(family), **changes))

    def open_cramped(self, family: str, **changes: Any) -> LLM:
        """Open the model with hardly more KV memory than one longest request needs; refused plans cost little."""
        kv_bytes = _SMALLEST_KV_BYTES
        while True:
            try:
                return self.open(family, kv_bytes=kv_bytes, **changes)
            except PlanRefusedError:
                if kv_bytes > self._kv_bytes():
                    raise
                kv_bytes += kv_bytes // 4

    def open_swapping(self, family: str, **changes: Any) -> LLM:
        """Open the model with hardly any KV memory and room on the host, where the runner copies blocks.

        One that does not says so at the start, and has to work without.
        """
        changes = {"expected_output_percent": 0, **changes}
        try:
            return self.open_cramped(family, **_HOST, **changes)
        except EngineError as error:
            if "copies no KV blocks" not in str(error):
                raise
            return self.open_cramped(family, **changes)

    def _kv_bytes(self) -> int:
        """Return room for more requests of the longest kind than run at once."""
        return max(_KV_BYTES, _NUM_CONTEXTS * self.max_model_len * kv_token_bytes(self.capabilities))


def families(*names: str) -> list[Any]:
    """Return parameters of a test, one per family (none named: all), that run where its features are claimed."""
    chosen = names or tuple(FAMILIES)
    return [pytest.param(name, marks=exercises(*FAMILIES[name].features), id=name) for name in chosen]


def prompt_tokens(length: int, number: int = 0) -> list[int]:
    """Return the token ids of prompt `number`; different numbers begin differently."""
    return [(17 + 41 * number + 37 * i + i * i * (3 + number) + i // 256 * 53) % 256 for i in range(length)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Return options that always take the best token and never end early."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **options})


def answer(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[RequestOutput]:
    """Answer prompts of tokens, all at once, and check that no block was lost."""
    outputs = llm.generate([{"prompt_token_ids": list(tokens)} for tokens in prompts], sampling, use_tqdm=False)
    llm.engine.check_integrity()
    return outputs


def hold_answers(truth: Truth, record: Record, outputs: Sequence[RequestOutput], length: int) -> None:
    """Assert that every sample has `length` tokens and is what the model says."""
    for output in outputs:
        for sample in output.outputs:
            assert (sample.finish_reason, len(sample.token_ids)) == ("length", length), sample
            truth.hold_tokens(record, output.prompt_token_ids, sample.token_ids)
