"""Compiled grammars and the masks of their states, against sets of texts that are spelled out."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.structured_forms import HOSTILE_GRAMMARS, HOSTILE_REGEXES, HOSTILE_SCHEMAS
from zif.contract import StructuredOutput
from zif.errors import RequestError
from zif.null.runner import allowed_tokens
from zif.structured import GrammarCompiler, TokenVocabulary
from zif.structured import state as state_module
from zif.structured.cache import ByteBoundedCache

VOCAB_SIZE = 3072
EOS = 0
WORDS = ["yes", "yesterday", "no", 'a "quote"\n', "naïve", "x" * 30]


def masks_of(state, guesses=()):
    masks = np.empty((1 + len(guesses), VOCAB_SIZE // 32), dtype=np.int32)
    state.fill_masks(guesses, masks)
    return [allowed_tokens(mask, VOCAB_SIZE) for mask in masks]


def next_tokens(tokenizer, texts, so_far):
    """Return what may follow `so_far`: each token that leads on to one of the texts, and the end where one is whole."""
    rests = [text.encode()[len(so_far) :] for text in texts if text.encode().startswith(so_far)]
    spelled = {i: tokenizer.decode([i], skip_special_tokens=False).encode() for i in range(3, VOCAB_SIZE)}
    whole = {i: text for i, text in spelled.items() if "\ufffd".encode() not in text and text}
    found = {i for i, text in whole.items() if any(rest.startswith(text) for rest in rests)}
    return found | ({EOS} if b"" in rests else set())


def readable(token_ids, tokenizer):
    """Leave out tokens that are parts of characters: their bytes cannot be told from their text."""
    return {i for i in token_ids if i == EOS or "\ufffd" not in tokenizer.decode([i], skip_special_tokens=False)}


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.sampled_from(WORDS), min_size=1, max_size=5, unique=True), seed=st.integers(0, 2**16))
def test_a_choice_allows_what_leads_to_one_of_the_texts(compiler, tokenizer, texts, seed):
    chance, state, so_far = np.random.default_rng(seed), compiler.begin(StructuredOutput(choice=texts)), []
    while True:
        (allowed,) = masks_of(state)
        # Of several ways to spell what must come, the tokenizer's own may be the only one that is left.
        text = tokenizer.decode(so_far)
        if "\ufffd" not in text:
            expected = next_tokens(tokenizer, texts, text.encode())
            assert readable(allowed, tokenizer) <= expected
            assert (EOS in allowed) == (EOS in expected)
        token = int(chance.choice(allowed))
        if token == EOS:
            break
        so_far.append(token)
        state.follow([token])
    assert tokenizer.decode(so_far) in texts
    assert state.num_followed == len(so_far)


def test_a_regex_may_end_where_it_matches_only(compiler, tokenizer):
    state = compiler.begin(StructuredOutput(regex="a{2,3}"))
    a = tokenizer.token_id("a")
    ends = []
    for _ in range(3):
        ends.append(EOS in masks_of(state)[0])
        state.follow([a])
    assert ends == [False, False, True]
    assert masks_of(state) == [[EOS]]


def test_masks_after_guesses_are_those_after_the_tokens_and_leave_no_trace(compiler, tokenizer):
    form = StructuredOutput(json={"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}})
    text = tokenizer.encode("[1, 23]")
    one_by_one = []
    state = compiler.begin(form)
    for token in [*text, None]:
        one_by_one += masks_of(state)
        if token is not None:
            state.follow([token])
    state = compiler.begin(form)
    for known in range(len(text)):
        assert masks_of(state, text[known:]) == one_by_one[known:]
        state.follow(text[known : known + 1])
    assert masks_of(state) == one_by_one[-1:]


@pytest.mark.parametrize("wrong", [EOS, 70])
def test_after_a_guess_that_is_refused_or_ends_anything_goes(compiler, tokenizer, wrong):
    state = compiler.begin(StructuredOutput(regex="a*"))
    a = tokenizer.token_id("a")
    before = masks_of(state)
    first, second, third, fourth = masks_of(state, [a, wrong, a])
    assert [first, second] == [*before, *masks_of(state, [a])[1:]]
    assert third == fourth == list(range(VOCAB_SIZE))
    assert masks_of(state) == before
    assert state.fault is None


def test_states_of_one_form_are_independent(compiler, tokenizer):
    form = StructuredOutput(choice=["ab", "cd"])
    first, second = compiler.begin(form), compiler.begin(form)
    first.follow([tokenizer.token_id("a")])
    assert masks_of(first) == [[tokenizer.token_id("b")]]
    assert tokenizer.token_id("c") in masks_of(second)[0]


def test_a_token_that_breaks_the_form_is_a_fault_of_the_state(compiler, tokenizer):
    state = compiler.begin(StructuredOutput(regex="a+"))
    state.follow([tokenizer.token_id("b")])
    assert "cannot be followed" in (state.fault or "")
    assert masks_of(state) == [[]]


def test_a_form_that_takes_too_long_ends_its_request_only(compiler, monkeypatch):
    monkeypatch.setattr(state_module, "GRACE_S", 0.0)
    state = compiler.begin(StructuredOutput(regex="a+"))
    assert masks_of(state) != [[]]
    assert "to follow so far" in (state.fault or "")
    assert masks_of(state) == [[]]


HOSTILE = [
    *(pytest.param({"json": schema}, id=name) for name, schema in HOSTILE_SCHEMAS.items()),
    *(pytest.param({"regex": regex}, id=name) for name, regex in HOSTILE_REGEXES.items()),
    *(pytest.param({"grammar": grammar}, id=name) for name, grammar in HOSTILE_GRAMMARS.items()),
]


@pytest.mark.parametrize("fields", HOSTILE)
def test_a_hostile_form_is_refused_and_others_are_served(compiler, fields):
    with pytest.raises(RequestError) as caught:
        compiler.check(StructuredOutput(**fields))
    assert "<non-verbose" not in str(caught.value)
    assert len(str(caught.value)) < 600
    compiler.check(StructuredOutput(regex="still"))


AMBIGUOUS = {
    "every split": 'start: start start | "a" | start start start',
    "repeats of repeats": 'start: ((("a"{0,1000}){0,1000}){0,1000}){0,1000}',
    "doubling rules": "\n".join(["start: a0", *(f"a{i}: a{i + 1} a{i + 1} | a{i + 1}" for i in range(60)), 'a60: "a"']),
}


@pytest.mark.parametrize("grammar", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_an_ambiguous_grammar_ends_by_a_limit(compiler, tokenizer, grammar):
    state = compiler.begin(StructuredOutput(grammar=grammar))
    a, began = tokenizer.token_id("a"), time.thread_time()
    for _ in range(2000):
        if masks_of(state) == [[]]:
            break
        state.follow([a])
    assert state.fault is not None
    assert time.thread_time() - began < 20


def test_a_model_without_an_end_or_a_tokenizer_says_so(vocabulary):
    form = StructuredOutput(regex="a")
    with pytest.raises(RequestError, match="end-of-sequence"):
        GrammarCompiler(TokenVocabulary(vocabulary.definition, VOCAB_SIZE, frozenset())).check(form)
    with pytest.raises(RequestError, match="tokenizer"):
        GrammarCompiler(TokenVocabulary(lambda: "{}", VOCAB_SIZE, frozenset({0}))).check(form)


@pytest.mark.parametrize("width", [1024, 3072, 4096])
def test_logits_may_be_narrower_or_wider_than_the_tokenizer(vocabulary, width):
    compiler = GrammarCompiler(TokenVocabulary(vocabulary.definition, width, vocabulary.eos_ids))
    masks = np.empty((1, width // 32), dtype=np.int32)
    compiler.begin(StructuredOutput(regex="(.|\n)*")).fill_masks([], masks)
    allowed = allowed_tokens(masks[0], width)
    assert allowed
    assert max(allowed) < min(width, VOCAB_SIZE)


def test_threads_may_compile_at_once(compiler):
    errors = []

    def compile_many(number):
        try:
            for i in range(20):
                compiler.check(StructuredOutput(regex=f"thread{number}or{i % 5}"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=compile_many, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []


def test_compiled_forms_are_kept_within_bytes(vocabulary):
    compiler = GrammarCompiler(vocabulary, cache_bytes=1 << 20)
    for i in range(60):
        compiler.check(StructuredOutput(regex=f"form {i}"))
        assert 0 < compiler.cached_bytes <= 1 << 20
    assert compiler.cached_bytes > 1 << 19


@settings(max_examples=200)
@given(
    limit=st.integers(0, 50),
    calls=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 20)), max_size=60),
)
def test_the_cache_is_a_model_of_least_recent_use(limit, calls):
    cache, model = ByteBoundedCache(limit), {}
    for is_put, key, size in calls:
        if not is_put:
            assert cache.get(key) == (model[key][0] if key in model else None)
            if key in model:
                model[key] = model.pop(key)
            continue
        model.pop(key, None)
        if size <= limit:
            while sum(kept for _, kept in model.values()) + size > limit:
                del model[next(iter(model))]
            model[key] = (object(), size)
        cache.put(key, model[key][0] if key in model else None, size)
        assert len(cache) == len(model)
        assert cache.num_bytes == sum(kept for _, kept in model.values()) <= limit
