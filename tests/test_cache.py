"""The prompt cache: which prompts are the same, how long one counts as recent, and what is dropped."""

from types import SimpleNamespace

import pytest

from prompting_nb.baseminer.answering import Once, RepeatedPrompt
from prompting_nb.baseminer.cache import PromptCache, prompt_key
from prompting_nb.protocol import Prompting


def asked(text, role="user", hotkey="a"):
    return SimpleNamespace(roles=(role,), messages=(text,), dendrite=SimpleNamespace(hotkey=hotkey))


def test_what_makes_a_prompt_the_same():
    keys = {prompt_key(asked("x")), prompt_key(asked("y")), prompt_key(asked("x", role="system"))}
    assert len(keys) == 3 and {len(key) for key in keys} == {16}
    assert prompt_key(asked("x", hotkey="b")) == prompt_key(asked("x")) == prompt_key(Prompting.ask("x"))
    assert prompt_key(asked("x", hotkey="b"), per_caller=True) != prompt_key(asked("x"), per_caller=True)


def test_a_claim_counts_up_to_and_including_the_span():
    cache = PromptCache(span=10)
    assert cache.claim(b"k", 5)
    assert [cache.recent(b"k", block) for block in (5, 15, 16)] == [True, True, False]
    assert not cache.claim(b"k", 15) and cache.claim(b"k", 16) and not cache.claim(b"k", 26)
    assert not PromptCache(span=0).recent(b"k", 5)


def test_a_claim_that_is_released_may_be_made_again():
    cache = PromptCache()
    assert cache.claim(b"k", 5)
    cache.release(b"k"), cache.release(b"never claimed")
    assert not cache.recent(b"k", 5) and cache.claim(b"k", 5)


def test_a_claim_is_released_by_the_request_that_has_made_it():
    block, question = [1], Prompting.ask("hello")
    once = Once(PromptCache(span=1), lambda: block[0])
    with pytest.raises(ValueError, match="late"), once.claimed(question):
        block[0] = 3
        with once.claimed(question):
            pass
        raise ValueError("late")
    with pytest.raises(RepeatedPrompt), once.claimed(question):  # it has been answered at block 3
        pass


def test_old_claims_and_the_oldest_beyond_the_bound_are_dropped():
    cache = PromptCache(span=10, max_entries=3)
    for block, key in enumerate((b"a", b"b", b"c", b"d")):
        assert cache.claim(key, block)
    assert len(cache) == 3 and not cache.recent(b"a", 3) and cache.recent(b"b", 3)
    assert cache.claim(b"e", 13)
    assert len(cache) == 2  # b and c are out of the span; d is claimed at block 3, e at 13
    assert cache.recent(b"d", 13) and cache.recent(b"e", 13)


def test_a_renewed_claim_is_the_youngest():
    cache = PromptCache(span=1, max_entries=2)
    cache.claim(b"a", 0), cache.claim(b"b", 1), cache.claim(b"a", 2), cache.claim(b"c", 2)
    assert cache.recent(b"a", 2) and cache.recent(b"c", 2) and len(cache) == 2


def test_settings_have_bounds_and_defaults():
    assert (PromptCache().span, PromptCache().max_entries) == (7200, 100_000)
    assert PromptCache(0, 1).claim(b"k", 1)
    for span, most in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"span must be >= 0 and max_entries >= 1, not {span} and {most}"):
            PromptCache(span, most)
