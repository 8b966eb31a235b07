"""Preference pairs with a structure that can be learned: questions, good answers and flawed ones.

A good answer is friendly, to the point and correct. A flawed one is wrong in one of five ways: the
fact is another's, the tone is rude, it dodges the question, it repeats itself, or it breaks off.
Held-out pairs combine facts, wordings and flaws as no training pair does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .pairs import Pair


@dataclass(frozen=True)
class Skill:
    """Facts of one kind: the question about a subject, and the sentence that answers it."""

    question: str
    answer: str
    facts: dict[str, str]


def _facts(text: str) -> dict[str, str]:
    return dict(item.split("=") for item in text.split())


SKILLS = (
    Skill(
        "what is the opposite of {}?",
        "The opposite of {} is {}.",
        _facts(
            "hot=cold big=small fast=slow light=dark early=late open=closed full=empty loud=quiet "
            "young=old wet=dry thick=thin high=low soft=hard near=far rich=poor up=down"
        ),
    ),
    Skill(
        "what color is a {}?",
        "A {} is {}.",
        _facts(
            "lemon=yellow tomato=red leaf=green raven=black swan=white plum=purple carrot=orange "
            "flamingo=pink chestnut=brown sapphire=blue mouse=gray"
        ),
    ),
    Skill(
        "what is the capital of {}?",
        "The capital of {} is {}.",
        _facts(
            "France=Paris Italy=Rome Spain=Madrid Japan=Tokyo Egypt=Cairo Peru=Lima Kenya=Nairobi "
            "Norway=Oslo Greece=Athens Cuba=Havana Austria=Vienna Poland=Warsaw Ireland=Dublin"
        ),
    ),
    Skill(
        "what sound does a {} make?",
        "A {} goes {}.",
        _facts(
            "cow=moo cat=meow dog=woof duck=quack sheep=baa bee=buzz lion=roar "
            "snake=hiss pig=oink frog=croak rooster=crow"
        ),
    ),
    Skill(
        "which number comes after {}?",
        "After {} comes {}.",
        _facts(
            "one=two two=three three=four four=five five=six six=seven seven=eight eight=nine "
            "nine=ten ten=eleven eleven=twelve twelve=thirteen"
        ),
    ),
)

WORDINGS = (
    "Tell me, {}",
    "Please help me: {}",
    "I would like to know {}",
    "Quick question: {}",
    "Do you know {}",
    "My child asks {}",
)
OPENINGS = ("Sure!", "Happy to help.", "Of course!", "Good question!")
CLOSINGS = ("", " I hope that helps.", " Have a nice day!")
RUDE_OPENINGS = ("Ugh.", "What a silly question.", "Not again.", "Are you serious?")
RUDE_CLOSINGS = (
    " Look it up yourself next time.",
    " Stop wasting my time.",
    " Everyone knows that.",
)
DODGES = (
    "That depends on many things.",
    "People have different opinions about that.",
    "It is hard to say.",
    "You should ask an expert.",
)


@dataclass(frozen=True)
class Answer:
    """A good answer in its parts, for the flaws to work on."""

    skill: Skill
    subject: str
    opening: str
    closing: str

    @property
    def fact(self) -> str:
        return self.skill.answer.format(self.subject, self.skill.facts[self.subject])

    def __str__(self) -> str:
        return f"{self.opening} {self.fact}{self.closing}"


def _wrong(answer: Answer, rng: random.Random) -> str:
    right = answer.skill.facts[answer.subject]
    other = rng.choice([fact for fact in answer.skill.facts.values() if fact != right])
    fact = answer.skill.answer.format(answer.subject, other)
    return f"{answer.opening} {fact}{answer.closing}"


def _rude(answer: Answer, rng: random.Random) -> str:
    return f"{rng.choice(RUDE_OPENINGS)} {answer.fact}{rng.choice(RUDE_CLOSINGS)}"


def _evasive(answer: Answer, rng: random.Random) -> str:
    return f"{answer.opening} {rng.choice(DODGES)}{answer.closing}"


def _repetitive(answer: Answer, rng: random.Random) -> str:
    return " ".join([answer.opening, *[answer.fact] * rng.choice((2, 3))]) + answer.closing


def _unfinished(answer: Answer, rng: random.Random) -> str:
    words = f"{answer.opening} {answer.fact}".split()
    return " ".join(words[: rng.randint(2, len(words) - 1)])


FLAWS: dict[str, Callable[[Answer, random.Random], str]] = {
    "wrong": _wrong,
    "rude": _rude,
    "evasive": _evasive,
    "repetitive": _repetitive,
    "unfinished": _unfinished,
}


def _good_answers(skill: Skill, subject: str) -> frozenset[str]:
    return frozenset(
        str(Answer(skill, subject, opening, closing))
        for opening in OPENINGS
        for closing in CLOSINGS
    )


def make_pairs(count: int, seed: int) -> list[Pair]:
    """`count` different pairs as conversations, the flaws in equal parts."""
    rng = random.Random(seed)
    pairs: dict[tuple[str, str, str], Pair] = {}
    names = list(FLAWS)
    while len(pairs) < count:
        flaw = names[len(pairs) % len(names)]
        skill = rng.choice(SKILLS)
        subject = rng.choice(list(skill.facts))
        question = rng.choice(WORDINGS).format(skill.question.format(subject))
        answer = Answer(skill, subject, rng.choice(OPENINGS), rng.choice(CLOSINGS))
        rejected = FLAWS[flaw](answer, rng)
        pairs[question, str(answer), rejected] = Pair(
            [{"role": "user", "content": question}],
            [{"role": "assistant", "content": str(answer)}],
            [{"role": "assistant", "content": rejected}],
            flaw,
            _good_answers(skill, subject),
        )
    return list(pairs.values())
