"""Chats through the offline interface: the template, and what is said when there is none."""

import json
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from zif import LLM, SamplingParams
from zif.errors import ConfigError, RequestError
from zif.text.tokenizer import load_tokenizer

SAMPLING = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama3", tmp_path_factory.mktemp("model"))


def test_chat_renders_the_template_without_doubled_special_tokens(model: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    conversation = [{"role": "user", "content": "hello"}]
    with LLM(model, platform="null", max_model_len=64, chat_template=template) as llm:
        output = llm.chat(conversation, SAMPLING, use_tqdm=False)[0]
        both = llm.chat([conversation, conversation], SAMPLING, use_tqdm=False)
        assert output.prompt == "<user>hello"
        assert output.prompt_token_ids == load_tokenizer(model).encode("<user>hello", add_special_tokens=False)
        assert [o.prompt for o in both] == ["<user>hello"] * 2


def test_chat_without_template_is_refused(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with LLM(folder, platform="null", max_model_len=64) as llm, pytest.raises(RequestError, match="chat template"):
        llm.chat([{"role": "user", "content": "x"}], SAMPLING, use_tqdm=False)


def test_missing_chat_template_file_is_a_config_error(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-such-file\.jinja"):
        LLM(model, platform="null", max_model_len=64, chat_template="no-such-file.jinja")
