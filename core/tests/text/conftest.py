"""One tokenizer of each kind, loaded once."""

import pytest

from support.tokenizer_kinds import KINDS
from zif.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session", params=list(KINDS))
def tokenizer_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    KINDS[request.param](folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)
