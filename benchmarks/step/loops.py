"""The training loops that are compared. All see the same batches in the same order, the same AdamW
and the same initial weights; on a GPU under bf16 autocast with fp32 weights, on a CPU in fp32.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import BETA
from benchmarks.measure import synchronize
from benchmarks.step import data, models
from fastdpo.data import PairCollator, micro_batches, reference_logps

LEARNING_RATE = 5e-5
# Of a part, where there is a budget: on a CPU a row at a time costs least.
MAX_TOKENS = {"cpu": 512, "cuda": 16_384}


@dataclass
class Run:
    """What a loop reports, step by step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reference_seconds: float | None = None  # of all steps, where it was computed before them


Parts = Callable[[int], list[list[dict[str, Any]]]]  # of a step's pairs


@dataclass(frozen=True)
class Job:
    """One training run."""

    model: str
    examples: list[dict[str, Any]]
    batch_size: int  # pairs
    device: torch.device

    @property
    def steps(self) -> int:
        return len(self.examples) // self.batch_size

    def batch(self, step: int) -> list[dict[str, Any]]:
        return self.examples[step * self.batch_size : (step + 1) * self.batch_size]


def ours(layout: str, reference_once: bool, budget: bool = False) -> Callable[[Job], Run]:
    """A plain loop over `fastdpo.integrations.hf.dpo_loss`. The reference's log-probabilities are
    computed in every step, or once before the first. With a budget of tokens a step's pairs are cut
    into parts of like lengths.
    """

    def loop(job: Job) -> Run:
        from fastdpo.integrations import hf

        attention = models.attention(layout, job.device)
        collator = PairCollator(data.PAD, layout, attention=attention)
        policy, reference = _models(job, attention)
        run, ref_model = Run(), reference

        def parts(step: int) -> list[list[dict[str, Any]]]:
            pairs = job.batch(step)
            if not budget:
                return [pairs]
            longest = max(collator.tokens_in([collator.length_of(pair)]) for pair in pairs)
            most = max(longest, MAX_TOKENS[job.device.type])
            return micro_batches(pairs, collator, most)

        if reference_once:
            run.reference_seconds = _ask_reference(job, reference, collator, parts)
            ref_model = reference = None

        def loss_of(batch: dict[str, Any]) -> Tensor:
            pairs = job.batch_size
            return hf.dpo_loss(policy, batch, ref_model, beta=BETA, num_pairs=pairs).loss

        return _plain_loop(job, policy, collator, run, loss_of, parts)

    return loop


def _ask_reference(job: Job, reference: Any, collator: PairCollator, parts: Parts) -> float:
    """Writes the reference's log-probabilities into the examples, in the batches of the training;
    the seconds that it took.
    """
    place = {id(example): i for i, example in enumerate(job.examples)}
    batches = [[place[id(e)] for e in part] for step in range(job.steps) for part in parts(step)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = reference_logps(
            reference,
            job.examples,
            collator,
            folder,
            batches=batches,
            autocast=_autocast_dtype(job.device),
            progress=False,
        )
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            for example, value in zip(job.examples, found[name], strict=True):
                example[name] = value
    return time.perf_counter() - start


def eager_loop(job: Job) -> Run:
    """The same loop with the original repository's loss: logits of every position, log_softmax."""
    policy, reference = _models(job)
    collator = PairCollator(data.PAD)
    loss_of = functools.partial(_eager_loss, policy, reference)
    return _plain_loop(job, policy, collator, Run(), loss_of)


def _plain_loop(
    job: Job,
    policy: torch.nn.Module,
    collator: PairCollator,
    run: Run,
    loss_of: Callable[[dict[str, Any]], Tensor],
    parts: Parts | None = None,
) -> Run:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(job.steps):
        synchronize(job.device)
        start = time.perf_counter()
        total = 0.0
        for part in [job.batch(step)] if parts is None else parts(step):
            batch = _on(job.device, collator(part))
            with _autocast(job.device):
                loss = loss_of(batch)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(job.device)
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(float(total))
    return run


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.bfloat16 if device.type == "cuda" else None


def _autocast(device: torch.device) -> torch.autocast:
    dtype = _autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _models(job: Job, attention: str = "sdpa") -> tuple[torch.nn.Module, torch.nn.Module]:
    policy, reference = (models.build(job.model, job.device, attention=attention) for _ in range(2))
    return policy, reference.requires_grad_(False).eval()


def _eager_loss(policy: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    from fastdpo.demo.memory import eager_logps

    with torch.no_grad():
        ref_logps = eager_logps(reference, batch)
    chosen, rejected = (eager_logps(policy, batch) - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def trl_loop(job: Job) -> Run:
    """TRL's DPOTrainer as it ships."""
    return _trl_loop(job, lambda trainer: trainer)


def trl_fastdpo_loop(job: Job) -> Run:
    """TRL's DPOTrainer whose log-probabilities are fastdpo's."""
    from fastdpo.integrations.trl import use_fastdpo

    return _trl_loop(job, use_fastdpo)


def _trl_loop(job: Job, adapt: Callable[[Any], Any]) -> Run:
    """`DPOTrainer.train()`, with gradient checkpointing off and no clipping, as in the other
    loops.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    run = Run()

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronize(job.device)
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(job.device)
            run.seconds.append(time.perf_counter() - self.start)

    class Recorder(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            run.losses.append(loss.detach())
            return loss

    policy, reference = _models(job)
    texts = [_as_text(e) for e in job.examples[: job.steps * job.batch_size]]
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            beta=BETA,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch",
            max_length=None,
            bf16=job.device.type == "cuda",
            use_cpu=job.device.type == "cpu",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Recorder(
            policy,
            reference,
            args,
            train_dataset=Dataset.from_list(texts),
            processing_class=_tokenizer(models.vocabulary(job.model)),
            callbacks=[Clock()],
        )
        adapt(trainer).train()
    run.losses = [float(loss) for loss in run.losses]
    return run


def _as_text(example: dict[str, list[int]]) -> dict[str, str]:
    """Words that `_tokenizer` turns back into the same ids; the trainer adds EOS itself."""
    prompt = " ".join(f"t{i}" for i in example["prompt_ids"])
    answers = {
        side: "".join(f" t{i}" for i in example[f"{side}_ids"][:-1])
        for side in ("chosen", "rejected")
    }
    return {"prompt": prompt, **answers}


def _tokenizer(vocab: int) -> Any:
    """One word per token id."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": data.PAD, "<eos>": data.EOS}
    words |= {f"t{i}": i for i in range(len(words), vocab)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


_TRL, _REFERENCE = ("trl", "datasets", "tokenizers"), ("datasets",)


@dataclass(frozen=True)
class Loop:
    run: Callable[[Job], Run]
    summary: str
    needs: tuple[str, ...] = ()  # beside transformers


# In the order of the waterfall: each of ours adds one thing to the one before it.
LOOPS: dict[str, Loop] = {
    "eager": Loop(eager_loop, "logits and log_softmax of every position, padded"),
    "trl": Loop(trl_loop, "TRL's DPOTrainer as it ships (chunked log-probabilities)", _TRL),
    "trl-fastdpo": Loop(
        trl_fastdpo_loop, "the same trainer with fastdpo.integrations.trl.use_fastdpo", _TRL
    ),
    "fastdpo": Loop(ours("padded", False), "hf.dpo_loss of padded pairs: the loss alone"),
    "reference-once": Loop(
        ours("padded", True), "and the reference computed once, by reference_logps", _REFERENCE
    ),
    "packed": Loop(ours("packed", True), "and rows without padding", _REFERENCE),
    "shared-prompts": Loop(
        ours("shared_prompts", True), "and each prompt once for both answers", _REFERENCE
    ),
    "token-budget": Loop(
        ours("shared_prompts", True, budget=True),
        "and parts of like lengths, to a budget",
        _REFERENCE,
    ),
}
WATERFALL = ("fastdpo", "reference-once", "packed", "shared-prompts", "token-budget")


def absent(name: str) -> str | None:
    """Why a loop cannot run here; None where it can."""
    needed = ("transformers", *LOOPS[name].needs)
    gone = [module for module in needed if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(gone)}" if gone else None
