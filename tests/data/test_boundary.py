"""Where the prompt ends in the ids: for tokenizers that add tokens, and that merge across it."""

from __future__ import annotations

import pytest
import small_tokenizers

from fastdpo.data.boundary import pair_ids

PROMPTS = ["The sky is", "Say yes.\n", "It is so, ", "no", "\n\nHuman: Hi.\n\nAssistant:"]
ANSWERS = [" blue.", "blue", "yes yes", " ", "-", "\n", "ed"]


@pytest.mark.parametrize("make", small_tokenizers.ALL)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_ids_are_the_text_and_the_prompt_s_are_those_it_is_asked_with(make, prompt, answer):
    tokenizer = make()
    found = pair_ids(tokenizer, prompt, answer, " other", special=True)
    asked = tokenizer(prompt)["input_ids"]
    if make is small_tokenizers.beginning_and_end:
        asked = asked[:-1]  # it adds an end to a prompt too
    assert found.prompt_ids == asked
    assert found.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert found.chosen_ids[-1] == tokenizer.eos_token_id
    bos = "" if make is small_tokenizers.byte_level else "<s>"
    text = tokenizer.decode(found.prompt_ids + found.chosen_ids)
    assert text.replace("<s> ", "<s>") == f"{bos}{prompt}{answer}</s>"
    whole = tokenizer(prompt + answer)["input_ids"]
    begins = whole[: len(asked)] == asked
    if begins:
        assert (asked + found.chosen_ids)[: len(whole)] == whole
    else:
        assert found.spanned


def test_some_of_them_merge_and_some_do_not():
    """Else the test above would show less than it seems to."""
    spanned = {
        (make.__name__, prompt): pair_ids(make(), prompt, "blue", "red", special=True).spanned
        for make in small_tokenizers.ALL
        for prompt in PROMPTS
    }
    assert {name for (name, _), value in spanned.items() if value} >= {"byte_level", "metaspace"}
    assert not spanned["byte_level", "Say yes.\n"]


def test_one_answer_may_merge_and_the_other_not():
    tokenizer = small_tokenizers.byte_level()
    found = pair_ids(tokenizer, "The sky is ", "blue", "\n", special=False)
    assert found.spanned
    assert found.prompt_ids == tokenizer("The sky is ")["input_ids"]
    assert tokenizer.decode(found.chosen_ids) == "blue"
    assert tokenizer.decode(found.rejected_ids) == "\n"


def test_an_answer_that_ends_in_the_end_token_gets_no_second():
    tokenizer = small_tokenizers.beginning_and_end()
    found = pair_ids(tokenizer, "Say", " yes</s>", " no", special=True)
    end = tokenizer.eos_token_id
    assert [ids.count(end) for ids in (found.chosen_ids, found.rejected_ids)] == [1, 1]
    twice = pair_ids(tokenizer, "Say</s>", " yes</s></s>", " no", special=True)
    assert twice.prompt_ids[-1] == end
    assert twice.chosen_ids[-2:] == [end, end]


class Lowering:
    """Writes text that follows a prompt otherwise than by itself, in ids that say so."""

    eos_token, eos_token_id = "<e>", 0

    def __call__(self, text, add_special_tokens=True):
        text = text.replace(" b", "B")
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, **_):
        return "".join(chr(i) for i in ids)


def test_ids_that_would_be_another_text_are_refused():
    with pytest.raises(ValueError, match=r"a token spans the end of 'prompt' .* of 'chosen'"):
        pair_ids(Lowering(), "a ", "b", "c", special=True)


def test_what_has_no_tokens():
    tokenizer = small_tokenizers.byte_level()
    for texts, message in [
        (("", "a", "b"), "'prompt' is empty"),
        (("a", "", "b"), "'chosen' is empty"),
        (("a", "b", ""), "'rejected' is empty"),
        (("a", "b", "b"), "chosen and rejected are the same tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            pair_ids(tokenizer, *texts, special=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        pair_ids(tokenizer, "a", "b", "c", special=True)
