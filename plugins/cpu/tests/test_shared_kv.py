"""Models whose last layers read the keys and values of earlier ones, through the whole engine on this platform."""

from pathlib import Path

import pytest

from support.checkpoints import SHARING
from support.greedy_parity import assert_greedy_parity, assert_logit_parity, checkpoint, settings
from zif import LLM
from zif.contract import AttentionSpec


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharing")


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("budget", [7, 64])
def test_tokens_are_those_of_transformers(family, budget, root, monkeypatch):
    assert_greedy_parity(family, root, monkeypatch, max_num_batched_tokens=budget)


@pytest.mark.parametrize("family", SHARING)
def test_logits_are_those_of_transformers(family, root):
    assert_logit_parity(family, root, max_num_batched_tokens=7)


@pytest.mark.parametrize("family", SHARING)
def test_layers_that_read_take_no_memory(family, root):
    with LLM.from_settings(settings(checkpoint(family, root))) as llm:
        specs = [group.spec for group in llm.plan.kv_groups]
    assert all(isinstance(spec, AttentionSpec) for spec in specs)
    owners = sorted(layer for spec in specs for layer in spec.layers)
    readers = sorted(pair for spec in specs for pair in spec.readers)
    assert owners == [0, 1, 2]
    assert readers == [(3, 2), (4, 1)]
