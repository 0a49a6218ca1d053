"""What Transformers computes with a tiny model: logits in float64 and in the declared dtype, of given tokens.

Outputs are judged by teacher forcing: at each token that the platform chose, was it the best one of the exact model,
wherever that is decided? Two right answers may then differ after a tie, and a wrong one cannot hide behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zif_conformance.gates.model import model_divergence, model_top1
from zif_conformance.gates.result import Record, hold
from zif_conformance.oracle.inputs import torch_dtype
from zif_conformance.tiny_models.checkpoints import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Truth:
    """One tiny model in float64 and in the dtype that the platform runs it in.

    With a `kv_dtype` the latter keeps keys and values as a cache of that dtype holds them: what that costs is allowed.
    """

    folder: Path
    exact_model: Any
    declared_model: Any
    kv_dtype: str | None = None

    @classmethod
    def of(cls, folder: Path, dtype: str, kv_dtype: str | None = None) -> "Truth":
        """Load the checkpoint twice."""
        return cls(folder, _load(folder, torch.float64), _load(folder, torch_dtype(dtype)), kv_dtype)

    def hold_tokens(
        self, record: Record, prompt: Sequence[int], output: Sequence[int], bias: Mapping[int, float] | None = None
    ) -> None:
        """Assert gate G7 for greedy tokens: each is the best after the tokens before it, where that is decided.

        `bias` is what the request adds to logits.
        """
        assert output, f"no token after a prompt of {len(prompt)}"
        chosen = torch.nn.functional.one_hot(torch.tensor(list(output)), VOCAB_SIZE).float()
        exact, declared = self._logits([*prompt, *output[:-1]], len(output))
        added = torch.zeros(VOCAB_SIZE, dtype=exact.dtype)
        for token_id, size in (bias or {}).items():
            added[token_id] = size
        hold(record, model_top1(chosen, exact + added, declared + added))

    def hold_logprobs(self, record: Record, token_ids: Sequence[int], logprobs: torch.Tensor) -> None:
        """Assert gate G7 for log-probabilities [T, V] of what follows each of the last T of `token_ids`."""
        exact, declared = self._logits(token_ids, len(logprobs))
        hold(record, model_top1(logprobs, exact, declared), model_divergence(logprobs, exact, declared))

    def hold_hidden(self, record: Record, token_ids: Sequence[int], hidden: torch.Tensor) -> None:
        """Assert gate G7 for hidden states [T, C] of the last T of `token_ids`: the exact model's head reads them."""
        with torch.inference_mode():
            logits = self.exact_model.lm_head(hidden.double())
        self.hold_logprobs(record, token_ids, logits.log_softmax(-1))

    def _logits(self, token_ids: Sequence[int], num_last: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([list(token_ids)])
        with torch.inference_mode():
            exact = self.exact_model(ids, use_cache=False).logits
            declared = self.declared_model(ids, **self._cache()).logits
        return exact[0, -num_last:].double(), declared[0, -num_last:].double()

    def _cache(self) -> dict[str, Any]:
        """Return the arguments that make the declared model see what a cache holds."""
        if self.kv_dtype is None:
            return {"use_cache": False}
        from zif_conformance.tiny_models.held_cache import HeldCache

        return {"use_cache": True, "past_key_values": HeldCache(self.declared_model.config, self.kv_dtype)}


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
