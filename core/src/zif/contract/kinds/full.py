"""Full attention: every token sees every earlier token."""

from dataclasses import dataclass

from zif.contract.capabilities import Feature
from zif.contract.kinds.attention import AttentionSpec
from zif.contract.kinds.whole_history import WholeHistorySpec


@dataclass(frozen=True, slots=True)
class FullAttentionSpec(WholeHistorySpec, AttentionSpec):
    """Blocks live as long as the request."""

    @property
    def kind(self) -> str:
        return "full"

    @property
    def feature(self) -> Feature:
        return Feature.ATTENTION_FULL
