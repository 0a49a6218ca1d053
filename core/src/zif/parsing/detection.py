"""Which format a model writes, guessed by its chat template.

A template shows earlier answers to the model, so it writes what the model writes. Rules, in this order:

| what | the format |
|---|---|
| the template has all `templates` texts of formats | of these formats the one with most texts, then with the longest |
| there is no template | the same, with the special tokens in the template's place |
| nothing of the kind | `plain` |
"""

from collections.abc import Iterable
from functools import cache

from zif.parsing.formats import Format, format_names, load_format

PLAIN = "plain"


def detect_format(template: str, special_tokens: Iterable[str] = ()) -> str:
    """Return the name of the format that fits a chat template's source best, `plain` where none does."""
    # A template that says nothing of tools outweighs tokens, which derived models keep from their base.
    text = template or "\n".join(special_tokens)
    fitting = [form for form in _formats() if form.templates and all(mark in text for mark in form.templates)]
    best = max(fitting, key=_weight, default=None)
    return best.name if best else PLAIN


def _weight(form: Format) -> tuple[int, int]:
    return len(form.templates), sum(map(len, form.templates))


@cache
def _formats() -> tuple[Format, ...]:
    return tuple(map(load_format, format_names()))
