"""Text in pieces equals the text decoded at once."""

from itertools import chain

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.tokenizer_kinds import write_byte_fallback, write_byte_level
from zif.text.detokenizer import Detokenizer
from zif.text.tokenizer import load_tokenizer

relaxed = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    write_byte_level(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_fallback")
    write_byte_fallback(folder)
    return load_tokenizer(folder)


def pieces(detokenizer, token_ids, cuts=()):
    """Append `token_ids` in parts that end at `cuts` (one by one without cuts)."""
    ends = sorted({*cuts, len(token_ids)}) if cuts else range(1, len(token_ids) + 1)
    begin, texts = 0, []
    for end in ends:
        texts.append(detokenizer.append(token_ids[begin:end]))
        begin = end
    return [*texts, detokenizer.finish()]


def id_lists(tokenizer, max_size):
    """Random ids, and the ids of random texts, with ids that have no token."""
    some = st.integers(0, tokenizer.max_token_id + 2)
    texts = st.text(alphabet="ab .'ntsé中👩 \n", max_size=8).map(lambda text: tokenizer.encode(text))
    return st.lists(st.one_of(st.lists(some, max_size=6), texts), max_size=max_size).map(lambda parts: [*chain(*parts)])


@relaxed
@given(data=st.data(), skip=st.booleans())
def test_pieces_equal_the_whole(tokenizer, data, skip):
    token_ids = data.draw(id_lists(tokenizer, 5))
    cuts = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=5))
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(Detokenizer(tokenizer, (), skip), token_ids, cuts)) == whole


@relaxed
@given(data=st.data(), skip=st.booleans())
def test_output_continues_the_prompt(tokenizer, data, skip):
    prompt, output = data.draw(id_lists(tokenizer, 5)), data.draw(id_lists(tokenizer, 4))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    assert "".join(pieces(Detokenizer(tokenizer, prompt, skip), output)) == whole[len(before) :]


@relaxed
@given(data=st.data())
def test_long_runs_of_bytes(byte_fallback, data):
    """A run of byte tokens is read as a whole, also where it crosses from the prompt into the output."""
    runs = st.lists(st.one_of(st.integers(3, 258), st.sampled_from([260, 270])), max_size=30)
    characters = st.text(alphabet="👩é", max_size=9).map(lambda text: [3 + byte for byte in text.encode()])
    run = st.one_of(runs, characters)
    prompt, output = data.draw(run), data.draw(run)
    before, whole = byte_fallback.decode(prompt), byte_fallback.decode(prompt + output)
    assert "".join(pieces(Detokenizer(byte_fallback, prompt), output)) == whole[len(before) :]


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="abé中👩 ", max_size=20))
@example(text="👩‍👩‍👧 end")
def test_no_piece_of_valid_text_has_half_a_character(tokenizer, byte_level, text):
    token_ids = byte_level.encode(text)
    assert all("\ufffd" not in piece for piece in pieces(Detokenizer(byte_level), token_ids))


def test_text_comes_as_soon_as_it_is_complete(byte_level):
    token_ids = byte_level.encode("a中b")
    texts = pieces(Detokenizer(byte_level), token_ids)
    assert [text for text in texts if text] == ["a", "中", "b"]
    assert texts[-1] == ""


def test_the_space_at_the_border_of_the_prompt_is_kept(byte_fallback):
    hello = byte_fallback.encode("hello", add_special_tokens=False)
    assert Detokenizer(byte_fallback, byte_fallback.encode("hello")).append(hello) == " hello"
    assert Detokenizer(byte_fallback).append(hello) == "hello"
    assert Detokenizer(byte_fallback, [byte_fallback.bos_token_id]).append(hello) == "hello"


def test_an_unfinished_character_comes_out_at_the_end(byte_level):
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.append(byte_level.encode("ö")[:1]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_hidden_tokens_give_nothing(byte_level):
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.append([byte_level.eos_token_id, 100_000]) == ""
    assert detokenizer.finish() == ""
    assert Detokenizer(byte_level, skip_special_tokens=False).append([byte_level.eos_token_id]) == "<|eos|>"


@pytest.mark.parametrize("token", ["Ã", "the", "<|eos|>"], ids=["half characters", "text", "hidden"])
def test_work_is_linear(byte_level, token):
    """Twenty thousand tokens decode far fewer than the 2e8 tokens of quadratic work."""
    decoded = 0
    decode = byte_level.decode_raw

    def counting(token_ids, skip_special_tokens):
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids, skip_special_tokens)

    token_ids = [byte_level.token_id(token)] * 20_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_level, "decode_raw", counting)
        text = "".join(pieces(Detokenizer(byte_level), token_ids))
    assert decoded < 5 * len(token_ids)
    assert text == byte_level.decode(token_ids)
