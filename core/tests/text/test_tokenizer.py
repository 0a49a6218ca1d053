"""Tokenizers against transformers' AutoTokenizer, and what is refused."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from support.tiny_tokenizer import PAD_ID
from support.tokenizer_kinds import write_byte_fallback, write_byte_level, write_python_vocabulary, write_word_level
from zif.errors import ConfigError, ModelError
from zif.text.tokenizer import load_tokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  hello   world.  ",
    "the thing and\nthe\tother",
    "naïve é 中文 👩‍👩‍👧 \u0000 end",
    "<s>hello</s><|eos|>",
    "do n't , he 's hello . world ! ' n ' t",
]


@pytest.fixture(scope="module")
def theirs(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


class TestEqualToTransformers:
    @pytest.mark.parametrize("add_special_tokens", [True, False])
    def test_encoding(self, tokenizer, theirs, add_special_tokens):
        expected = [theirs(text, add_special_tokens=add_special_tokens)["input_ids"] for text in TEXTS]
        assert [tokenizer.encode(text, add_special_tokens) for text in TEXTS] == expected
        assert tokenizer.encode_batch(TEXTS, add_special_tokens) == expected

    @settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data(), skip=st.booleans())
    def test_decoding(self, tokenizer, theirs, data, skip):
        ids = data.draw(st.lists(st.integers(0, tokenizer.max_token_id), max_size=12))
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    def test_the_vocabulary(self, tokenizer, theirs):
        assert tokenizer.vocab() == theirs.get_vocab()
        assert tokenizer.vocab_size == len(theirs)
        assert tokenizer.max_token_id == max(theirs.get_vocab().values())
        assert tokenizer.special_ids == frozenset(theirs.all_special_ids) | {
            i for i, token in theirs.added_tokens_decoder.items() if token.special
        }
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert named == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        for token_id in range(0, tokenizer.max_token_id + 1, 7):
            token = tokenizer.token_text(token_id)
            assert token == theirs.convert_ids_to_tokens(token_id)
            assert tokenizer.token_id(token) == token_id

    def test_special_tokens_that_only_the_configuration_names(self, tmp_path):
        write_byte_level(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {
            "image_token": "<image>",
            "extra_special_tokens": ["<call>"],
            "added_tokens_decoder": {
                "400": {"content": "<tool>", "special": False, "normalized": False},
                "399": {"content": "the", "special": True},
                str(PAD_ID): {"content": "<|pad|>", "lstrip": True, "special": True},
            },
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        self.assert_equal_on(tmp_path, "in the <image><call> of <tool> there", "the in <|pad|>the")

    @pytest.mark.parametrize("content", ["</s>", {"content": "</s>", "lstrip": True, "rstrip": False}])
    def test_special_tokens_in_files_of_their_own(self, tmp_path, content):
        write_byte_fallback(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": content, "pad_token": "<pad>"}))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 277, "hello!": 278}))
        self.assert_equal_on(tmp_path, "hello hello! <pad></s> hello </s>")
        assert load_tokenizer(tmp_path).eos_token_id == 2

    def test_truncation_and_padding_of_the_training_run_are_ignored(self, tmp_path):
        write_byte_level(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        self.assert_equal_on(tmp_path, "the thing and the other")
        assert len(load_tokenizer(tmp_path).encode("abcdefgh")) == 8

    @pytest.mark.parametrize("forced", [False, True])
    def test_spaces_of_byte_pairs_are_cleaned_only_when_forced(self, tmp_path, forced):
        write_byte_level(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": forced,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.encode("a . b")) == ("a. b" if forced else "a . b")

    def test_a_folder_without_tokenizer_json(self, tmp_path):
        write_python_vocabulary(tmp_path)
        self.assert_equal_on(tmp_path, "hello hell shell", "中 <|endoftext|>")
        assert load_tokenizer(tmp_path).eos_token_id == 259

    @staticmethod
    def assert_equal_on(folder, *texts):
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        for text in texts:
            ids = theirs(text)["input_ids"]
            assert ours.encode(text) == ids
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.vocab_size == len(theirs)
        assert ours.vocab() == theirs.get_vocab()


class TestBesides:
    def test_ids_without_a_token_give_no_text(self, tokenizer):
        assert tokenizer.token_text(10_000) is None
        ids = tokenizer.encode("hello")
        assert tokenizer.decode([10_000, *ids, 10_000]) == tokenizer.decode(ids)

    def test_unknown_tokens_have_no_id(self, tokenizer):
        assert tokenizer.token_ids(["no such token", tokenizer.token_text(1)]) == [None, 1]


class TestRefused:
    def test_a_folder_without_a_tokenizer(self, tmp_path):
        with pytest.raises(ModelError, match=r"no tokenizer in .*tokenizer\.json.*token ids as prompts"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {"type": "Nonsense"}}'])
    def test_a_broken_vocabulary(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match=r"tokenizer\.json of .* cannot be read"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[1]", '{"added_tokens_decoder": {"3": 4}}'])
    def test_a_broken_configuration(self, tmp_path, content):
        write_word_level(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
            load_tokenizer(tmp_path)

    def test_transformers_missing_where_it_is_needed(self, tmp_path, monkeypatch):
        write_python_vocabulary(tmp_path)
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ConfigError, match=r"pip install 'zif\[transformers\]'"):
            load_tokenizer(tmp_path)

    def test_a_vocabulary_that_transformers_cannot_read(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(b"nothing")
        with pytest.raises(ModelError, match="transformers cannot load the tokenizer"):
            load_tokenizer(tmp_path)


def test_importing_and_loading_needs_neither_torch_nor_transformers(tmp_path):
    write_word_level(tmp_path)
    program = (
        "import sys, pathlib, zif.text.chat, zif.text.chat_environment, zif.text.detokenizer, zif.text.stop_strings\n"
        "from zif.text.tokenizer import load_tokenizer\n"
        "load_tokenizer(pathlib.Path(sys.argv[1])).encode('hello')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
