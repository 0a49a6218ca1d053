"""From a form to a grammar compiled for one vocabulary, bounded in time and memory, and kept for the next request.

llguidance compiles in about a millisecond and computes masks as they are needed, so nothing is prepared per vocabulary
but the trie of its tokens (https://github.com/guidance-ai/llguidance). Every limit below is one of work or memory, so
that no form makes a step of the engine wait long.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zif.contract import Grammars, GrammarState, StructuredOutput
from zif.errors import ConfigError, RequestError
from zif.structured.cache import ByteBoundedCache
from zif.structured.notation import grammar_text
from zif.structured.state import FaultyState, MaskShape, MatcherState, mask_of, reason_of

if TYPE_CHECKING:
    import llguidance

logger = logging.getLogger(__name__)

CACHE_BYTES = 64 << 20
COMPILED_BASE_BYTES = 64 << 10
COMPILED_BYTES_PER_CHARACTER = 200
"""What a compiled grammar is taken to hold: about twice what was measured over schemas of 1 to 10 KB."""

INITIAL_LEXER_FUEL = 200_000
STEP_LEXER_FUEL = 200_000
STEP_MAX_ITEMS = 10_000
MAX_ITEMS_IN_ROW = 5_000
MAX_LEXER_STATES = 20_000
"""About 2 kB each."""
MAX_GRAMMAR_SIZE = 40_000
"""Symbols. These are work for one grammar or one mask, in the units of `LLParserLimits`: a few times what schemas of
hundreds of properties need, and for a vocabulary of 150,000 about 30 ms a mask at worst."""


@dataclass(frozen=True, slots=True)
class TokenVocabulary:
    """The tokens that grammars are compiled for.

    `definition` returns the text of a `tokenizer.json`; it is called once, with the first grammar. `vocab_size` is the
    width of the logits; `eos_ids` end an answer.
    """

    definition: Callable[[], str]
    vocab_size: int
    eos_ids: frozenset[int]


class GrammarCompiler(Grammars):
    """Compile forms for one vocabulary, and keep the compiled ones, the least recently used going first.

    `check` may be called by several threads: compiling leaves Python's lock to the others.
    """

    def __init__(self, vocabulary: TokenVocabulary, cache_bytes: int = CACHE_BYTES) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        self._cache: ByteBoundedCache[tuple[str, str, str | None], llguidance.LLMatcher] = ByteBoundedCache(cache_bytes)

    @property
    def cached_bytes(self) -> int:
        """Return what the compiled grammars that are kept are taken to hold."""
        return self._cache.num_bytes

    def load(self) -> None:
        """Build the trie of the vocabulary now rather than with the first form: about a second for 150,000 tokens.

        Raises `ConfigError` when llguidance is not installed, `RequestError` when the model has no fitting tokenizer.
        """
        self._loaded_tokenizer()

    def check(self, form: StructuredOutput) -> None:
        """Compile a form. Raises `RequestError` when that fails, exceeds a limit, or leaves no token to begin with."""
        self._compiled(form)

    def begin(self, form: StructuredOutput) -> GrammarState:
        try:
            return MatcherState(self._compiled(form).deep_copy(), self._shape())
        except RequestError as error:
            return FaultyState(str(error))

    def _compiled(self, form: StructuredOutput) -> "llguidance.LLMatcher":
        key = (form.kind.value, form.text, form.or_grammar)
        with self._lock:
            matcher = self._cache.get(key)
        if matcher is None:
            matcher = self._compile(form)
            with self._lock:
                num_characters = len(form.text) + len(form.or_grammar or "")
                self._cache.put(key, matcher, COMPILED_BASE_BYTES + COMPILED_BYTES_PER_CHARACTER * num_characters)
        return matcher

    def _compile(self, form: StructuredOutput) -> "llguidance.LLMatcher":
        tokenizer = self._loaded_tokenizer()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=INITIAL_LEXER_FUEL,
            step_lexer_fuel=STEP_LEXER_FUEL,
            step_max_items=STEP_MAX_ITEMS,
            max_items_in_row=MAX_ITEMS_IN_ROW,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        matcher = LLMatcher(tokenizer, grammar_text(form), log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"{form.kind.value} cannot be compiled: {reason_of(matcher)}; correct or simplify it")
        # The first mask also builds the parts of the lexer that every answer needs.
        mask = mask_of(matcher, self._shape().num_words)
        if not mask.any():
            reason = reason_of(matcher) or "nothing matches"
            raise RequestError(f"{form.kind.value} allows no token of this model ({reason}); correct or simplify it")
        return matcher

    def _shape(self) -> MaskShape:
        return MaskShape((self._loaded_tokenizer().vocab_size + 31) // 32, self._vocabulary.eos_ids)

    def _loaded_tokenizer(self) -> "llguidance.LLTokenizer":
        if self._tokenizer is None:
            self._tokenizer = _build_tokenizer(self._vocabulary)
        return self._tokenizer


def _build_tokenizer(vocabulary: TokenVocabulary) -> "llguidance.LLTokenizer":
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise ConfigError("structured output needs llguidance; run: pip install 'zif[serve]'") from error
    if not vocabulary.eos_ids:
        raise RequestError(
            "structured output needs an end-of-sequence token, and the model declares none; set eos_token_id in its "
            "generation_config.json"
        )
    definition, eos_ids = vocabulary.definition(), sorted(vocabulary.eos_ids)
    try:
        return LLTokenizer(definition, n_vocab=vocabulary.vocab_size, eos_token=eos_ids)
    except ValueError as error:
        logger.info("the tokenizer may be wider than the model's %d logits: %s", vocabulary.vocab_size, error)
    try:
        return LLTokenizer(definition, eos_token=eos_ids)
    except ValueError as error:
        raise RequestError(f"structured output cannot use this model's tokenizer: {error}") from error
