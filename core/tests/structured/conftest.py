"""The embedded model's vocabulary, compiled for once."""

from pathlib import Path

import pytest

from zif.structured import GrammarCompiler, TokenVocabulary
from zif.text.tokenizer import load_tokenizer

MODEL = Path(__file__).resolve().parents[3] / "examples" / "embedded_model" / "checkpoint"
VOCAB_SIZE = 3072


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    definition = tokenizer.definition()
    assert definition is not None
    return TokenVocabulary(lambda: definition, VOCAB_SIZE, frozenset({tokenizer.eos_token_id}))


@pytest.fixture(scope="session")
def compiler(vocabulary):
    return GrammarCompiler(vocabulary)
