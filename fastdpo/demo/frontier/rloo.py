"""TRL's RLOO trainer with the true reward, under its own name: TRL 1 has no PPO trainer any more.

Needs trl and datasets, so it is in no plan but `plan.trl_plan` (`examples/frontier/run.py --trl`).
Its β is fixed, and so its optimum is DPO's of that β.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from .evaluate import Meter
from .lab import Place
from .settings import Settings
from .world import World, text

ITERATIONS = 2  # optimizer steps on each batch of answers


def word_tokenizer(world: World) -> Any:
    """Words to their numbers; padding and an end that no answer has lie beyond the vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {text([word]): word for word in range(world.vocab_size)}
    words.update({"<pad>": world.vocab_size, "<end>": world.vocab_size + 1})
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def train_rloo(place: Place, beta: float, settings: Settings, seed: int, meter: Meter) -> None:
    """As many optimizer steps as every method, on at most as many answers.

    Raises:
        ValueError: the world's answers stop, which this tokenizer does not know.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    world = place.world
    if world.stops:
        raise ValueError("world should be one without stops: RLOO here takes full-length answers")
    size = 2 * settings.batch

    def reward(completion_ids: list[list[int]], row: list[int], **_: Any) -> Any:
        answers = torch.tensor(completion_ids)
        meter.reward_calls += len(answers)
        meter.samples += len(answers)
        return world.rewards[torch.tensor(row), world.index(answers)].tolist()

    class Evaluation(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if meter.due(state.global_step):
                model = kwargs["model"]
                training = model.training
                meter(state.global_step, model.eval())
                model.train(training)

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(world.prompt_tokens), (settings.draws,), generator=generator)
    prompts: Tensor = world.prompt_tokens[drawn]
    dataset = Dataset.from_dict(
        {"prompt": [text(prompt) for prompt in prompts.tolist()], "row": drawn.tolist()}
    )
    with tempfile.TemporaryDirectory() as folder:
        # The trainer loads policy and reference itself.
        place.reference.save_pretrained(folder)
        trainer = RLOOTrainer(
            model=folder,
            reward_funcs=reward,
            args=RLOOConfig(
                output_dir=folder,
                max_steps=settings.steps,
                per_device_train_batch_size=size,
                num_generations=settings.completions,
                num_iterations=ITERATIONS,
                steps_per_generation=1,
                max_completion_length=world.length,
                generation_kwargs={"min_new_tokens": world.length},
                beta=beta,
                learning_rate=settings.lr,
                lr_scheduler_type="linear",
                max_grad_norm=1.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=dataset,
            processing_class=word_tokenizer(world),
            callbacks=[Evaluation()],
        )
        trainer.train()
