"""Which hidden states a request wants back: what embeddings and scores are made of."""

from enum import StrEnum


class HiddenRows(StrEnum):
    """The tokens of a request whose final hidden state the runner reports: the last known one, or every one."""

    LAST = "last"
    ALL = "all"
