"""Ids of answers and calls: random, ours alone, never a caller's."""

import secrets


def new_id(kind: str) -> str:
    """Return an id that tells its kind, such as "msg_5f0c..."; 96 random bits."""
    return f"{kind}_{secrets.token_hex(12)}"
