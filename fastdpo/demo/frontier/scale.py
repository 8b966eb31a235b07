"""The same study where nothing can be enumerated: a Llama of 20–100 M parameters, V ≥ 32,000,
answers of up to 256 tokens. Made for a GPU, on which it has not run; a test runs it on a CPU at
tiny sizes.

The world keeps the shape of the small one: a random chain of tokens to learn from, and a reward
that can be computed: each token has a fixed value, and the reward is the mean value times √length,
whose spread does not depend on the length. The KL is no longer a sum over answers; it is

    KL(π ‖ π_ref) = E_{y ~ π} Σ_t KL(π(·|y<t) ‖ π_ref(·|y<t))

with the inner KL summed exactly over the vocabulary at every token of sampled answers: only the
prefixes are sampled, which leaves far less variance than log π(y) − log π_ref(y).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...integrations import hf
from .sweep import write_json

IGNORED = -100


@dataclass(frozen=True)
class ScaleConfig:
    """Sizes of the large version; the defaults are about 60 M parameters.

    Raises:
        ValueError: naming the field.
    """

    vocab_size: int = 32_000
    prompt_length: int = 16
    answer_length: int = 256
    hidden: int = 640
    intermediate: int = 1792
    layers: int = 8
    heads: int = 10

    sft_steps: int = 2000
    sft_batch: int = 32
    sft_lr: float = 1e-3
    branches: int = 64  # continuations of each token in the chain

    prompts: int = 4096
    completions: int = 4
    sample_batch: int = 256  # answers sampled, or scored, at once
    steps: int = 600
    batch: int = 32  # pairs a step
    lr: float = 2e-5
    betas: tuple[float, ...] = (0.05, 0.1, 1.0)
    evaluations: int = 4
    evaluation_answers: int = 512
    kl_rows: int = 512  # tokens whose [rows, V] distributions exist at once

    device: str = "cuda"
    dtype: str = "bfloat16"  # of the autocast; float32: none
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and field.type == "int" and value < 1:
                raise ValueError(f"{field.name} should be at least 1, got {value}")
        if self.branches > self.vocab_size:
            raise ValueError(f"branches should be at most vocab_size, got {self.branches}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden should be a multiple of heads, got {self.hidden}")
        if self.completions < 2:
            raise ValueError(f"completions should be at least 2, got {self.completions}")
        if not self.betas or any(not beta > 0 for beta in self.betas):
            raise ValueError(f"betas should be positive, got {self.betas}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype should be bfloat16 or float32, got {self.dtype!r}")
        pairs = self.prompts * self.completions * (self.completions - 1) // 2
        if self.batch > pairs:
            raise ValueError(f"batch should be at most {pairs} pairs, got {self.batch}")
        if self.evaluations > self.steps:
            raise ValueError(f"evaluations should be at most steps, got {self.evaluations}")

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bfloat16")


class Chain:
    """Every token has `branches` continuations, the k-th with probability ∝ 1 / (k + 1)."""

    def __init__(self, config: ScaleConfig):
        self.config = config
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        size = (config.vocab_size, config.branches)
        options: dict[str, Any] = {"generator": self.generator, "device": config.device}
        self.following = torch.randint(config.vocab_size, size, **options)
        self.values = torch.randn(config.vocab_size, **options)
        self.weights = 1 / torch.arange(1, config.branches + 1, device=config.device)

    def text(self, rows: int, length: int) -> Tensor:  # -> [rows, length] int64
        token = torch.randint(
            self.config.vocab_size,
            (rows,),
            generator=self.generator,
            device=self.config.device,
        )
        tokens = [token]
        for _ in range(length - 1):
            branch = torch.multinomial(
                self.weights, rows, replacement=True, generator=self.generator
            )
            token = self.following[token, branch]
            tokens.append(token)
        return torch.stack(tokens, 1)

    def reward(self, answers: Tensor) -> Tensor:  # [N, L] -> [N] fp32
        return self.values[answers].mean(-1) * math.sqrt(answers.shape[-1])


def make_model(config: ScaleConfig) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.prompt_length + config.answer_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    return model.to(config.device)


def labels_of(config: ScaleConfig, input_ids: Tensor) -> Tensor:  # [N, T] -> [N, T]
    labels = input_ids.clone()
    labels[:, : config.prompt_length] = IGNORED
    return labels


def train_reference(config: ScaleConfig, chain: Chain) -> LlamaForCausalLM:
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, config.sft_steps)
    for _ in range(config.sft_steps):
        input_ids = chain.text(config.sft_batch, config.prompt_length + config.answer_length)
        with config.autocast():
            logps = hf.sequence_logps(model, input_ids, labels_of(config, input_ids))
        assert isinstance(logps, Tensor)
        (-logps.mean() / config.answer_length).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def answer(config: ScaleConfig, model: LlamaForCausalLM, prompts: Tensor) -> Tensor:
    """Prompts [N, P] to whole sequences [N, P + L], sampled at temperature 1."""
    parts = []
    for part in prompts.split(config.sample_batch):
        with config.autocast():
            parts.append(
                model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=config.answer_length,
                    min_new_tokens=config.answer_length,
                )
            )
    return torch.cat(parts)


@torch.no_grad()
def per_token_kl(
    config: ScaleConfig, policy: LlamaForCausalLM, reference: LlamaForCausalLM, input_ids: Tensor
) -> Tensor:  # [N, P + L] -> [N, L] fp32
    """KL(π(·|y<t) ‖ π_ref(·|y<t)) at every token of the answers, summed over the vocabulary.

    The logits exist for `kl_rows` tokens at a time, in fp32 from there on.
    """
    rows = []
    for part in input_ids.split(config.sample_batch):
        hidden = []
        for model in (policy, reference):
            with config.autocast():
                states = model.model(input_ids=part).last_hidden_state
            hidden.append(states[:, config.prompt_length - 1 : -1].flatten(0, 1))
        for ours, theirs in zip(*(h.split(config.kl_rows) for h in hidden), strict=True):
            with config.autocast():
                logits = policy.lm_head(ours), reference.lm_head(theirs)
            logps, ref_logps = (z.float().log_softmax(-1) for z in logits)
            rows.append((logps.exp() * (logps - ref_logps)).sum(-1))
    return torch.cat(rows).unflatten(0, (len(input_ids), -1))


def make_pairs(
    config: ScaleConfig, chain: Chain, reference: LlamaForCausalLM
) -> tuple[Tensor, Tensor]:  # -> [N, P + L] chosen, rejected
    """The paper's recipe: each two of the answers to a prompt, the higher reward chosen."""
    prompts = chain.text(config.prompts, config.prompt_length)
    drawn = answer(config, reference, prompts.repeat_interleave(config.completions, 0))
    rewards = chain.reward(drawn[:, config.prompt_length :]).view(-1, config.completions)
    drawn = drawn.view(-1, config.completions, drawn.shape[-1])
    first, second = torch.triu_indices(config.completions, config.completions, 1)
    better = (rewards[:, first] >= rewards[:, second])[..., None]
    a, b = drawn[:, first], drawn[:, second]
    return torch.where(better, a, b).flatten(0, 1), torch.where(better, b, a).flatten(0, 1)


def evaluate(
    config: ScaleConfig,
    chain: Chain,
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    prompts: Tensor,
) -> dict[str, float]:
    policy.eval()
    sequences = answer(config, policy, prompts)
    rewards = chain.reward(sequences[:, config.prompt_length :])
    kl = per_token_kl(config, policy, reference, sequences).sum(-1)
    policy.train()
    count = max(1, len(prompts) - 1) ** 0.5
    return {
        "reward": rewards.mean().item(),
        "reward_error": rewards.std(correction=0).item() / count,
        "kl": kl.mean().item(),
        "kl_error": kl.std(correction=0).item() / count,
    }


def run_scale(
    config: ScaleConfig, path: Path, progress: Callable[[str], None] = print
) -> dict[str, Any]:
    """DPO at every β, evaluated along training; the record is written to `path` after each β."""
    chain = Chain(config)
    clock = time.perf_counter()
    reference = train_reference(config, chain)
    progress(f"reference trained, {time.perf_counter() - clock:.0f} s")
    chosen, rejected = make_pairs(config, chain, reference)
    progress(f"{len(chosen)} pairs, {time.perf_counter() - clock:.0f} s")
    held_out = chain.text(config.evaluation_answers, config.prompt_length)
    record: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in reference.parameters()),
        "runs": [],
    }
    for beta in config.betas:
        start = time.perf_counter()
        policy = copy.deepcopy(reference).requires_grad_(True).train()
        curve = _train_dpo(config, chain, policy, reference, chosen, rejected, held_out, beta)
        seconds = time.perf_counter() - start
        record["runs"].append({"beta": beta, "curve": curve, "seconds": seconds})
        write_json(path, record)
        progress(f"β = {beta:g}: {curve[-1]}")
    return record


def _train_dpo(
    config: ScaleConfig,
    chain: Chain,
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    chosen: Tensor,
    rejected: Tensor,
    held_out: Tensor,
    beta: float,
) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0.0)
    due = {k * config.steps // config.evaluations for k in range(1, config.evaluations + 1)}
    warmup = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup)
    )
    generator = torch.Generator().manual_seed(config.seed)
    curve = [{"step": 0, **evaluate(config, chain, policy, reference, held_out)}]
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, config.steps + 1):
        while len(order) < config.batch:
            order = torch.cat([order, torch.randperm(len(chosen), generator=generator)])
        rows, order = order[: config.batch].to(chosen.device), order[config.batch :]
        input_ids = torch.cat([chosen[rows], rejected[rows]])
        batch = {"input_ids": input_ids, "labels": labels_of(config, input_ids)}
        with config.autocast():
            out = hf.dpo_loss(policy, batch, ref_model=reference, beta=beta)
        out.loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step in due:
            margin = (out.chosen_rewards - out.rejected_rewards).mean().item()
            values = evaluate(config, chain, policy, reference, held_out)
            curve.append({"step": step, **values, "margin": margin})
    return curve
