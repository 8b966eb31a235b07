"""Text to token ids, and where the prompt ends in them.

The prompt's ids are those of the prompt alone: what the model is given when it is asked. An
answer's ids are what follows them in the ids of prompt + answer. Where these do not begin with the
prompt's, because a token spans the end of the prompt, the answer is tokenized by itself; the ids of
both in a row then have to be the same text, so that nothing is lost or added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Behind one of these a text is tokenized as in the middle of another. Some tokenizers write a space
# before what stands at the very beginning.
_BEFORE = ("", "\n")


@dataclass(frozen=True)
class PairIds:
    """A pair as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    spanned: bool  # whether a token spans the end of the prompt, in the ids of prompt + an answer


def pair_ids(tokenizer: Any, prompt: str, chosen: str, rejected: str, *, special: bool) -> PairIds:
    """
    Args:
        prompt, chosen, rejected: text; the answers are what follows the prompt.
        special: the tokenizer adds its special tokens, and the answers get its end token: text that
            is through no chat template.

    Raises:
        ValueError: naming the column.
    """
    if special:
        chosen, rejected = _ended(tokenizer, chosen), _ended(tokenizer, rejected)
    prompt_ids = _ids(tokenizer, prompt, special)
    if not prompt_ids:
        raise ValueError("'prompt' is empty: it has no tokens")
    answers, spanned = [], False
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        whole = _ids(tokenizer, prompt + answer, special)
        found = whole[len(prompt_ids) :]
        if whole[: len(prompt_ids)] != prompt_ids:
            spanned = True
            found = _behind(tokenizer, prompt_ids, answer, whole, name)
        if not found:
            raise ValueError(f"{name!r} is empty: it has no tokens")
        answers.append(found)
    if answers[0] == answers[1]:
        raise ValueError("chosen and rejected are the same tokens")
    return PairIds(prompt_ids, answers[0], answers[1], spanned)


def _ended(tokenizer: Any, answer: str) -> str:
    if tokenizer.eos_token is None:
        raise ValueError("'chosen' is a string, and the tokenizer has no eos_token to go behind it")
    return answer if answer.endswith(tokenizer.eos_token) else answer + tokenizer.eos_token


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Without the end that some tokenizers add to every text: not to a prompt, nor twice."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if special and ids[-1:] == [tokenizer.eos_token_id]:
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if _ends(ids, tokenizer.eos_token_id) > _ends(bare, tokenizer.eos_token_id):
            return ids[:-1]
    return ids


def _ends(ids: list[int], end: int) -> int:
    """How many end tokens stand at the end."""
    return next((n for n, token in enumerate(reversed(ids)) if token != end), len(ids))


def _behind(
    tokenizer: Any, prompt_ids: list[int], answer: str, whole: list[int], name: str
) -> list[int]:
    """The answer's ids by itself, which are the text of `whole` behind the prompt's."""
    text = _text(tokenizer, whole)
    for before in _BEFORE:
        head = _ids(tokenizer, before, False) if before else []
        ids = _ids(tokenizer, before + answer, False)
        found = ids[len(head) :]
        if ids[: len(head)] == head and _text(tokenizer, prompt_ids + found) == text:
            return found
    raise ValueError(
        f"a token spans the end of 'prompt' and the beginning of {name!r}, and the tokenizer has "
        "no tokens for the two apart that are the same text. Move white space from the end of the "
        "prompt to the beginning of both answers"
    )


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
