"""What stands on top of a decoder, by the name of its architecture: an output matrix, a score head, or nothing.

The layers below are those of the family's causal language model in each case. No array library. Used by description,
loading and the engine.
"""

from dataclasses import dataclass
from enum import StrEnum

_CAUSAL = "ForCausalLM"
_CLASSES = "ForSequenceClassification"
_BARE = "Model"


class Head(StrEnum):
    """TOKENS: logits over the vocabulary. CLASSES: `score`, logits over labels. NONE: the decoder alone."""

    TOKENS = "tokens"
    CLASSES = "classes"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class HeadedArchitecture:
    """An architecture's family, named after its causal language model, and its head."""

    family: str
    head: Head


def split_architecture(name: str) -> HeadedArchitecture:
    """Read a class name of transformers: `Qwen3Model` and `Qwen3ForSequenceClassification` are `Qwen3ForCausalLM`."""
    if name.endswith(_CLASSES):
        return HeadedArchitecture(_family(name.removesuffix(_CLASSES)), Head.CLASSES)
    if name.endswith(_BARE) and not name.endswith("LMHeadModel"):
        return HeadedArchitecture(_family(name.removesuffix(_BARE)), Head.NONE)
    return HeadedArchitecture(name, Head.TOKENS)


def bare_architecture(name: str) -> str:
    """Return the class of the decoder alone: of `Qwen3ForCausalLM` it is `Qwen3Model`."""
    return split_architecture(name).family.removesuffix(_CAUSAL) + _BARE


def _family(stem: str) -> str:
    # Families that also see images name the classes of their text model apart.
    return stem.removesuffix("Text") + _CAUSAL
