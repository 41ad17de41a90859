"""Where a text ends and what of it is settled, token by token."""

import pytest

from moe_erc.data.tokenizer import ByteTokenizer
from moe_erc.evaluation.continuation import Continuation
from moe_erc.evaluation.sampling import Sampling

END = ByteTokenizer.eos_id


def settled_after_each(ids, stop=(), prompt="p"):
    """(what is settled after every token, the continuation)."""
    continuation, settled = Continuation(ByteTokenizer(), prompt, Sampling(stop=stop)), []
    for token in ids:
        continuation.extend([token])
        settled.append(continuation.settled)
    return settled, continuation


def at_once(ids, stop=()):
    continuation = Continuation(ByteTokenizer(), "p", Sampling(stop=stop))
    continuation.extend(ids)
    return continuation.text, continuation.ended


def test_the_prompt_is_no_part_of_it():
    settled, continuation = settled_after_each(b"ab", prompt="ä prompt")
    assert settled == ["a", "ab"] and continuation.text == "ab" and not continuation.ended
    assert continuation.prompt_ids == list("ä prompt".encode())


def test_without_a_prompt_a_document_starts():
    assert Continuation(ByteTokenizer(), "", Sampling()).prompt_ids == [END]


@pytest.mark.parametrize("end, stop", [(END, ()), (ord("."), (ord("."),)), (END, (ord("."),))])
def test_a_stop_token_ends_it(end, stop):
    ids = [*b"ab", end, *b"cd"]
    assert at_once(ids, stop) == ("ab", True)
    assert settled_after_each(ids, stop)[0] == ["a", "ab", "ab", "ab", "ab"]


def test_a_stop_text_ends_it_and_is_held_back_while_it_may_come():
    settled, continuation = settled_after_each(b"a\n\nb\n\n\nc", stop=("\n\n\n", "X"))
    assert settled == ["a", "a", "a", "a\n\nb", "a\n\nb", "a\n\nb", "a\n\nb", "a\n\nb"]
    assert (continuation.text, continuation.ended) == ("a\n\nb", True)
    settled, _ = settled_after_each(b"aab", stop=("aaa",))
    assert settled == ["", "", "aab"]


def test_the_stop_text_that_is_first_complete_ends_it_however_many_tokens_come_at_once():
    stop = ("abcd", "c", "bc")
    assert at_once(b"xabcd", stop) == ("xa", True)
    assert settled_after_each(b"xabcd", stop)[1].text == "xa"


def test_a_character_of_several_bytes_appears_whole():
    settled, continuation = settled_after_each("é→😀x".encode())
    assert settled == ["", "é", "é", "é", "é→", "é→", "é→", "é→", "é→😀", "é→😀x"]
    assert continuation.text == "é→😀x"


def test_bytes_that_are_no_character_appear_when_nothing_can_complete_them():
    settled, continuation = settled_after_each([0xE2, 0x82, ord("a"), 0xFF])
    assert settled == ["", "", "\ufffda", "\ufffda"]
    assert continuation.text == "\ufffda\ufffd"  # as it is where the tokens end
