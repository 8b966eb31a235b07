"""What the examples of other stacks run on where those are not at hand: the same signatures."""

from __future__ import annotations

import types

import torch
from torch import nn


class ColumnParallelLinear(nn.Linear):
    """What fastdpo reads of Megatron-Core's, and its call, in one process."""

    tp_group, sequence_parallel, skip_bias_add, disable_grad_reduce = None, False, False, False

    def forward(self, hidden, weight=None, runtime_gather_output=None):
        return hidden @ (self.weight if weight is None else weight).T, self.bias


class GPTModel(nn.Module):
    """Megatron-Core's: [S, B, H] inside; what the output processor returns is the output."""

    def __init__(self, vocab_size, hidden_size=32, tied=False, mup_output_mult=1.0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.mix = nn.GRU(hidden_size, hidden_size)
        self.output_layer = ColumnParallelLinear(hidden_size, vocab_size, bias=False)
        self.share_embeddings_and_output_weights, self.mup_output_mult = tied, mup_output_mult
        self.config = types.SimpleNamespace(context_parallel_size=1)

    def forward(
        self, input_ids, position_ids, attention_mask, decoder_input=None, labels=None,
        inference_context=None, packed_seq_params=None, extra_block_kwargs=None,
        runtime_gather_output=None, *, inference_params=None, loss_mask=None, padding_mask=None,
        output_processor=None, output_processor_context=None,
    ):  # fmt: skip
        hidden, _ = self.mix(self.embedding(input_ids.T))
        tied = self.share_embeddings_and_output_weights
        output_weight = self.embedding.weight if tied else None
        if output_processor is None:
            logits, _ = self.output_layer(hidden, weight=output_weight)
            return self._scale_logits(logits).transpose(0, 1)
        return output_processor(
            hidden_states=hidden, output_layer=self.output_layer, output_weight=output_weight,
            labels=labels, loss_mask=loss_mask, input_ids=input_ids, position_ids=position_ids,
            attention_mask=attention_mask, decoder_input=decoder_input,
            inference_context=inference_context, packed_seq_params=packed_seq_params,
            runtime_gather_output=runtime_gather_output, context=output_processor_context,
            compute_language_model_loss=None, scale_logits=self._scale_logits, config=self.config,
        )  # fmt: skip

    def _scale_logits(self, logits):
        return logits * self.mup_output_mult


class CustomDPOTrainer:
    """LLaMA-Factory's, as far as `concatenated_forward` is concerned."""

    def __init__(self, model, ref_model, beta=0.1, loss_type="sigmoid", ld_alpha=None):
        self.model, self.ref_model, self.beta = model, ref_model, beta
        self.loss_type, self.ld_alpha = loss_type, ld_alpha

    def concatenated_forward(self, model, batch, is_ref_model=False):
        raise NotImplementedError("theirs computes logits, [2B, T, V]")

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        out = self.concatenated_forward(model, batch)
        with torch.no_grad():
            ref = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
        chosen = self.beta * (out["chosen_logps"] - ref["chosen_logps"])
        rejected = self.beta * (out["rejected_logps"] - ref["rejected_logps"])
        loss = -nn.functional.logsigmoid(chosen - rejected).mean()
        return loss, {"rewards/accuracies": (chosen > rejected).float().mean().item()}
