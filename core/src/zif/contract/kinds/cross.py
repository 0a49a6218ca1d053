"""Cross-attention: every token sees the whole output of an encoder, and nothing else."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.attention import AttentionSpec
from zif.contract.kinds.whole_history import WholeHistorySpec


@dataclass(frozen=True, slots=True)
class CrossAttentionSpec(WholeHistorySpec, AttentionSpec):
    """Keys and values of a request's encoder input, up to `max_encoder_tokens` tokens.

    The step that computes the request's first token writes all of them; later ones only read. They depend on the
    encoder input alone, so requests with the same input share all blocks or none.
    """

    max_encoder_tokens: int = 0

    @property
    def kind(self) -> str:
        return "cross"

    @property
    def feature(self) -> Feature:
        return Feature.ATTENTION_CROSS

    @property
    def counts_encoder_tokens(self) -> bool:
        return True

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        return self.num_blocks(self.max_encoder_tokens)
