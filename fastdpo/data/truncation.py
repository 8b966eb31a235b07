"""Cutting a prompt and its answers to a length, so that the answers keep one prompt."""

from __future__ import annotations

from collections.abc import Sequence

TRUNCATION_MODES = ("keep_start", "keep_end")


def truncate(
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    max_length: int,
    mode: str = "keep_start",
) -> tuple[Sequence[int], list[Sequence[int]]]:
    """Prompt and answers of which no sequence (prompt and answer) is longer than max_length.

    Args:
        prompt: token ids.
        answers: token ids of every answer to it.
        max_length: in tokens.
        mode: "keep_start" cuts the ends of answers, as TRL does; "keep_end" the beginning of the
            prompt, and of all answers' prompt alike: as much as the longest answer needs. (TRL's
            `keep_end` cuts each sequence by itself, so that chosen and rejected answers follow
            different prompts.)

    Raises:
        ValueError: nothing would be left of an answer, or of the prompt.
    """
    longest = max((len(answer) for answer in answers), default=0)
    if len(prompt) + longest <= max_length:
        return prompt, list(answers)
    if mode == "keep_start":
        room = max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"max_length should leave room for an answer behind a prompt of {len(prompt)} "
                f"tokens, got {max_length}: raise it, leave the example out, or use "
                "truncation_mode='keep_end'"
            )
        return prompt, [answer[:room] for answer in answers]
    room = max_length - longest
    if room < 1:
        raise ValueError(
            f"max_length should leave room for a prompt before an answer of {longest} tokens, got "
            f"{max_length}: raise it, leave the example out, or use truncation_mode='keep_start'"
        )
    return prompt[len(prompt) - room :], list(answers)


def check_mode(mode: object) -> None:
    """
    Raises:
        ValueError: it is none.
    """
    if mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode should be one of {list(TRUNCATION_MODES)}, got {mode!r}")
