"""What is measured: an lm_head, a batch of pairs, how much of it carries loss, what is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

TRAINS = ("head", "frozen", "forward")
REFERENCES = ("given", "forward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class HeadShape(NamedTuple):
    """The lm_head of a published model."""

    hidden_size: int
    vocab_size: int
    softcap: float | None = None


HEADS = {
    "llama-3-8b": HeadShape(4096, 128_256),
    "qwen2.5-0.5b": HeadShape(896, 151_936),
    "qwen2.5-7b": HeadShape(3584, 152_064),
    "gemma-2-2b": HeadShape(2304, 256_000, 30.0),
    "mistral-7b": HeadShape(4096, 32_768),
    "gpt2": HeadShape(768, 50_257),  # a multiple of nothing
    # Heads that fit two CPU cores: real vocabularies with a smaller hidden size, and a tiny one.
    "llama-3-vocab-d896": HeadShape(896, 128_256),
    "llama-3-vocab-d512": HeadShape(512, 128_256),
    "mistral-vocab-d1024": HeadShape(1024, 32_768),
    "mistral-vocab-d256": HeadShape(256, 32_768),
    "gemma-2-vocab-d256": HeadShape(256, 256_000, 30.0),
    "tiny": HeadShape(48, 515),
    "tiny-softcap": HeadShape(48, 515, 5.0),
}


@dataclass(frozen=True)
class Scenario:
    """One row of the benchmark: `sequences` sequences, the first half chosen, of tokens / sequences
    positions.
    """

    head: str
    tokens: int  # positions, masked ones included
    share: float = 1.0  # of them that carry loss: the completions, at each sequence's end
    trains: str = "head"  # "head": backbone and lm_head; "frozen": backbone; "forward": nothing
    dtype: str = "bf16"
    sequences: int = 8
    reference: str = "given"  # "given": its log-probabilities; "forward": its hidden states
    peaked: bool = True  # a trained model's softmax, or a nearly flat one

    def __post_init__(self) -> None:
        for name, allowed in (
            ("head", HEADS),
            ("trains", TRAINS),
            ("reference", REFERENCES),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} should be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.sequences < 2 or self.sequences % 2:
            raise ValueError(f"sequences should be even and positive, got {self.sequences}")
        if self.tokens < self.sequences or self.tokens % self.sequences:
            raise ValueError(
                f"tokens should be a positive multiple of sequences ({self.sequences}), "
                f"got {self.tokens}"
            )
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share should be in (0, 1], got {self.share}")

    @property
    def shape(self) -> HeadShape:
        return HEADS[self.head]

    @property
    def length(self) -> int:
        """Positions of one sequence."""
        return self.tokens // self.sequences

    @property
    def loss_tokens(self) -> int:
        """N: positions of the batch that carry loss."""
        return self.sequences * max(1, round(self.share * self.length))

    @property
    def units(self) -> int:
        """Products of 2·N·V·D operations that are needed at least."""
        policy = {"head": 3, "frozen": 2, "forward": 1}[self.trains]
        return policy + (self.reference == "forward")

    @property
    def name(self) -> str:
        tokens = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        parts = [self.head, tokens, f"{self.share:.0%}", self.trains, self.dtype]
        if self.reference == "forward":
            parts.append("ref")
        if not self.peaked:
            parts.append("flat")
        return " ".join(parts)

    def with_tokens(self, tokens: int) -> Scenario:
        return replace(self, tokens=tokens)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **asdict(self),
            "hidden_size": self.shape.hidden_size,
            "vocab_size": self.shape.vocab_size,
            "softcap": self.shape.softcap,
            "loss_tokens": self.loss_tokens,
            "units": self.units,
        }


def from_dict(values: dict[str, Any]) -> Scenario:
    """The inverse of `Scenario.as_dict`."""
    return Scenario(**{k: values[k] for k in Scenario.__dataclass_fields__})


def _full() -> list[Scenario]:
    return [
        # What matters most comes first: time may be short.
        Scenario("llama-3-8b", 8192, share=0.5),
        Scenario("llama-3-8b", 8192, share=0.5, trains="frozen"),
        Scenario("llama-3-8b", 8192, share=0.5, trains="forward"),
        Scenario("gemma-2-2b", 8192, share=0.5),
        Scenario("llama-3-8b", 8192),
        Scenario("qwen2.5-0.5b", 8192, share=0.5),
        Scenario("llama-3-8b", 8192, share=0.25),
        Scenario("llama-3-8b", 8192, share=0.5, reference="forward"),
        Scenario("llama-3-8b", 2048, share=0.5, sequences=4),
        Scenario("llama-3-8b", 32_768, share=0.5, sequences=16),
        Scenario("llama-3-8b", 131_072, share=0.5, sequences=16),
        Scenario("qwen2.5-0.5b", 32_768, share=0.5, sequences=16),
        Scenario("qwen2.5-7b", 8192, share=0.5),
        Scenario("mistral-7b", 8192, share=0.5),
        Scenario("mistral-7b", 8192, share=0.5, trains="frozen"),
    ]


SUITES = {
    # On a GPU: under two minutes, and under ten.
    "quick": [
        Scenario("llama-3-8b", 8192),
        Scenario("llama-3-8b", 8192, share=0.5, trains="frozen"),
        Scenario("qwen2.5-0.5b", 8192, share=0.5),
    ],
    "full": _full(),
    # On two CPU cores: half an hour and five minutes, without torch-lce-chunked and its likes: they
    # take 20 to 30 s a step of the first scenario.
    "cpu": [
        Scenario("llama-3-vocab-d512", 512, dtype="fp32", sequences=4),
        Scenario("llama-3-vocab-d512", 512, dtype="bf16", sequences=4),
        Scenario("llama-3-vocab-d512", 512, dtype="fp32", sequences=4, trains="frozen"),
        Scenario("mistral-vocab-d1024", 512, share=0.25, dtype="fp32", sequences=4),
        Scenario("mistral-vocab-d1024", 1024, share=0.25, dtype="fp32", sequences=4),
        Scenario("mistral-vocab-d1024", 2048, share=0.25, dtype="fp32", sequences=4),
        Scenario("gemma-2-vocab-d256", 256, share=0.5, dtype="fp32", sequences=4),
    ],
    "cpu-quick": [
        Scenario("mistral-vocab-d1024", 512, share=0.5, dtype="fp32", sequences=4),
        Scenario("mistral-vocab-d1024", 512, share=0.5, dtype="bf16", sequences=4),
    ],
    "tiny": [
        Scenario("tiny", 64, share=0.5, dtype="fp32", sequences=4),
        Scenario("tiny-softcap", 64, share=0.5, dtype="bf16", sequences=4, trains="frozen"),
    ],
}
