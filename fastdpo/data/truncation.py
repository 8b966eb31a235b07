"""Cutting a prompt and its answers to a length, so that all answers keep the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

KEEP_START, KEEP_END = "keep_start", "keep_end"
MODES = (KEEP_START, KEEP_END)

Ids = Sequence[int]


def truncate(
    prompt_ids: Ids,
    answers: Sequence[Ids],
    max_length: int | None,
    mode: str = KEEP_START,
) -> tuple[Ids, list[Ids]]:
    """Prompt and answers with at most `max_length` tokens in the prompt and any answer together.

    "keep_start" cuts the ends of the answers, and with them their end token. "keep_end" cuts the
    start of the prompt, with a BOS if there is one, until the longest answer fits behind it;
    answers are never cut. What is left has at least one token of the prompt, which the first token
    of an answer is predicted from, and one of each answer.

    TRL's collator has the same two names. Its "keep_start" keeps the same tokens, and sequences
    without an answer where its trainer has not dropped them. Its "keep_end" cuts each
    sequence by itself: the prompts of a pair differ, and an answer that is too long loses its
    beginning. Here that pair is refused.

    Args:
        prompt_ids: token ids, at least one.
        answers: the token ids of each answer, at least one.
        max_length: in tokens, at least 2; None cuts nothing.
        mode: "keep_start" or "keep_end".

    Returns:
        prompt_ids, and the answers' token ids.

    Raises:
        ValueError: `max_length` or `mode` is none of these, or nothing of the answers
            ("keep_start") or of the prompt ("keep_end") would be left.
    """
    check(max_length, mode)
    if max_length is None:
        return prompt_ids, list(answers)
    if mode == KEEP_START:
        room = max_length - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, and max_length {max_length} leaves "
                "nothing of the answers"
            )
        return prompt_ids, [answer[:room] for answer in answers]
    longest = max(len(answer) for answer in answers)
    room = max_length - longest
    if room < 1:
        raise ValueError(
            f"the longest answer has {longest} tokens, and max_length {max_length} leaves nothing "
            "of the prompt"
        )
    return prompt_ids[-room:], list(answers)


def check(max_length: int | None, mode: str) -> None:
    """
    Raises:
        ValueError: naming the argument.
    """
    if mode not in MODES:
        raise ValueError(f"truncation_mode should be one of {', '.join(MODES)}, got {mode!r}")
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(
            "max_length should be None or an integer of at least 2, a token of the prompt and one "
            f"of an answer, got {max_length!r}"
        )
