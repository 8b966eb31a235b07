"""The ids of `prepare` are those that TRL's own DPOTrainer trains on, format by format; and what is
another number on purpose is named.
"""

from __future__ import annotations

import json

import pytest
import small_tokenizers
from hf_models import build
from preference_rows import IMPLICIT, SYSTEM, TURNS, ULTRAFEEDBACK, assistant, user

from fastdpo.data import prepare

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
EXPLICIT = [
    {"prompt": TURNS, "chosen": [assistant("d")], "rejected": [assistant("e")]},
    {
        "prompt": [SYSTEM, user("Say yes.")],
        "chosen": [assistant("yes"), user("no"), assistant("blue")],
        "rejected": [assistant("no")],
    },
]
FORMATS = {
    "strings": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
        {"prompt": "Say:\n", "chosen": "yes</s>", "rejected": "no"},
    ],
    "strings, no prompt": [
        {"chosen": "The sky is blue.", "rejected": "The sky is gray."},
        {"chosen": "Say:\nred", "rejected": "Say:\nblue"},
    ],
    "conversations": EXPLICIT,
    "conversations, no prompt": IMPLICIT,
    "tools": [{**row, "tools": [TOOL]} for row in EXPLICIT],
    "tools as JSON": [{**row, "tools": json.dumps([TOOL])} for row in EXPLICIT],
    "variables": [{**row, "chat_template_kwargs": {"tone": "kind"}} for row in EXPLICIT],
    "calls": [
        {
            "prompt": [user("one and two?"), assistant("yes"), user("so?")],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
            "rejected": [{"role": "assistant", "content": "no", "tool_calls": []}],
        }
    ],
}


def trained_on(rows, tokenizer, folder, **options):
    """The rows of ids that a DPOTrainer has made of them."""
    config = trl.DPOConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options
    )
    data = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(
        build("Llama"), build("Llama"), args=config, train_dataset=data, processing_class=tokenizer
    )
    return [{name: row[name] for name in IDS} for row in trainer.train_dataset]


def ids_of(rows):
    return [{name: row[name] for name in IDS} for row in rows]


CASES = [
    (name, make)
    for name in FORMATS
    for make in small_tokenizers.ALL
    # TRL has two ends there: `test_a_tokenizer_that_adds_an_end`.
    if not (make is small_tokenizers.beginning_and_end and name.startswith("strings"))
]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_the_ids_are_trl_s(name, make, tmp_path):
    rows, tokenizer = FORMATS[name], make()
    expected = trained_on(rows, make(), tmp_path, max_length=None)
    assert ids_of(prepare(rows, tokenizer)) == expected
    assert ids_of(prepare(datasets.Dataset.from_list(rows), tokenizer)) == expected


def test_a_reference_s_columns_stay(tmp_path):
    rows = [
        {"prompt": "Say", "chosen": " yes", "rejected": " no", **references}
        for references in [{"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}] * 2
    ]
    tokenizer = small_tokenizers.beginning()
    found = prepare(datasets.Dataset.from_list(rows), tokenizer)
    assert found.column_names == ["ref_chosen_logps", "ref_rejected_logps", *IDS]
    assert ids_of(found) == trained_on(rows, tokenizer, tmp_path)


def test_what_prepare_made_is_what_trl_s_collator_takes():
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = prepare(FORMATS["strings"], small_tokenizers.beginning())
    assert DataCollatorForPreference(pad_token_id=0)(rows)["input_ids"].shape[0] == 4


def test_pairs_that_are_too_long_are_those_that_trl_drops(tmp_path):
    rows = [{"prompt": "no " * n + "so", "chosen": " yes", "rejected": " no"} for n in (1, 9, 3)]
    tokenizer = small_tokenizers.beginning()
    whole = prepare(rows, tokenizer)
    length = len(whole[2]["prompt_ids"]) + 1
    assert len(whole[1]["prompt_ids"]) > length
    expected = trained_on(rows, tokenizer, tmp_path, max_length=length)
    with pytest.warns(UserWarning, match="1 of 3 pairs are too long"):
        found = prepare(rows, tokenizer, max_length=length, too_long="drop")
    cut = [
        {
            name: ids if name == "prompt_ids" else ids[: length - len(row["prompt_ids"])]
            for name, ids in row.items()
        }
        for row in expected  # TRL's collator cuts
    ]
    assert found == cut


# What differs on purpose: docs/tasks/data.md.


def test_a_token_that_spans_the_end_of_the_prompt(tmp_path):
    """TRL leaves the end of the prompt out, and has the whole token in the loss."""
    rows = [{"prompt": "The sky is ", "chosen": "blue.", "rejected": "black."}]
    tokenizer = small_tokenizers.byte_level()
    (theirs,) = trained_on(rows, tokenizer, tmp_path)
    assert tokenizer.decode(theirs["prompt_ids"]) == "The sky is"
    assert tokenizer.decode(theirs["chosen_ids"]) == " blue.</s>"
    with pytest.warns(UserWarning, match=r"in 1 of 1 rows a token spans the end of the prompt"):
        (ours,) = prepare(rows, tokenizer)
    assert ours["prompt_ids"] == tokenizer(rows[0]["prompt"])["input_ids"]
    assert tokenizer.decode(ours["chosen_ids"]) == "blue.</s>"


def test_a_template_that_changes_the_answered_prompt(tmp_path):
    """TRL takes what the two texts have in common for the prompt."""
    tokenizer = small_tokenizers.byte_level()
    tokenizer.chat_template = small_tokenizers.THINKING
    rows = [EXPLICIT[0]]
    (theirs,) = trained_on(rows, tokenizer, tmp_path)
    assert tokenizer.decode(theirs["prompt_ids"]).endswith("assistant>")
    with pytest.raises(ValueError, match="row 0: the chat template changes the prompt once it is"):
        prepare(rows, tokenizer)


def test_a_tokenizer_that_adds_an_end(tmp_path):
    """TRL has an end behind the prompt, which it takes away, and two behind an answer."""
    tokenizer = small_tokenizers.beginning_and_end()
    (theirs, _) = trained_on(FORMATS["strings"], tokenizer, tmp_path)
    assert theirs["chosen_ids"][-2:] == [tokenizer.eos_token_id] * 2
    ours = prepare(FORMATS["strings"], tokenizer)
    assert ours == prepare(FORMATS["strings"], small_tokenizers.beginning())
    assert theirs["chosen_ids"][:-1] == ours[0]["chosen_ids"]


def test_rows_that_trl_cannot_read_or_reads_twice(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    expected = prepare(IMPLICIT, tokenizer)
    # UltraFeedback: its prompt is a string, beside conversations.
    assert prepare(ULTRAFEEDBACK, tokenizer) == expected
    with pytest.raises((TypeError, AttributeError)):
        trained_on(ULTRAFEEDBACK, tokenizer, tmp_path)
    # A prompt that the answers repeat stands twice in TRL's sequences.
    repeated = [{**row, "prompt": row["chosen"][:1]} for row in IMPLICIT]
    assert prepare(repeated, tokenizer) == expected
    theirs = trained_on(repeated, tokenizer, tmp_path)
    assert tokenizer.decode(theirs[0]["chosen_ids"]).count("Say yes.") == 1


def test_an_empty_list_of_tools_is_none(tmp_path):
    """TRL gives a template the empty list, and some announce tools then, as Llama 3.1's."""
    tokenizer = small_tokenizers.byte_level()
    tokenizer.chat_template = tokenizer.chat_template.replace("if tools", "if tools is not none")
    rows = [{**EXPLICIT[0], "tools": "[]"}]
    (theirs,) = trained_on(rows, tokenizer, tmp_path)
    assert tokenizer.decode(theirs["prompt_ids"]).startswith("<s>tools: []")
    expected = prepare([EXPLICIT[0]], tokenizer)
    assert prepare(rows, tokenizer) == prepare(rows, tokenizer, tools=[]) == expected
