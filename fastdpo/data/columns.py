"""What the columns of prepared pairs are called: token ids as TRL has them, and the reference."""

from __future__ import annotations

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # sums
REFERENCE_TOKENS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
