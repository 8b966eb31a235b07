"""`prepare`: every kind of data set, every refusal with its row and column, every warning."""

from __future__ import annotations

import warnings

import pytest
import small_tokenizers
from preference_rows import HH, IMPLICIT, TURNS, ULTRAFEEDBACK, assistant, user

from fastdpo.data import prepare
from fastdpo.data.prepare import RowError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROW = {"prompt": "Say", "chosen": " yes", "rejected": " no"}
LONG = {"prompt": "Say " * 40 + "so", "chosen": " yes", "rejected": " no"}
SPANNING = {"prompt": "Say so, ", "chosen": "yes", "rejected": "no"}
TALK = {"prompt": TURNS, "chosen": [assistant("d")], "rejected": [assistant("e")]}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizers.beginning()


def split(rows, kind):
    data = datasets.Dataset.from_list(rows)
    return data if kind == "dataset" else data.to_iterable_dataset()


KINDS = ["list", "generator", "dataset", "iterable"]


def made(rows, kind):
    if kind == "list":
        return rows
    return iter(rows) if kind == "generator" else split(rows, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [HH, ULTRAFEEDBACK, IMPLICIT], ids=["hh", "ultra", "implicit"])
def test_every_kind_of_data_set_gives_the_same_rows(rows, kind, tokenizer):
    expected = prepare(rows, tokenizer)
    assert [sorted(row) for row in expected] == [sorted(IDS)] * len(rows)
    found = prepare(made(rows, kind), tokenizer)
    if kind in ("list", "generator"):
        assert isinstance(found, list)
    else:
        assert type(found) is type(made(rows, kind))
    assert list(found) == expected


@pytest.mark.parametrize("kind", ["dataset", "iterable"])
def test_a_dict_of_splits_stays_one_and_errors_name_the_split(kind, tokenizer):
    container = datasets.DatasetDict if kind == "dataset" else datasets.IterableDatasetDict
    found = prepare(container({"train": split(HH, kind), "test": split(HH[:2], kind)}), tokenizer)
    assert type(found) is container
    assert list(found["test"]) == list(found["train"])[:2] == prepare(HH[:2], tokenizer)
    if kind == "dataset":
        bad = {**ROW, "rejected": " yes"}
        splits = container({"train": split(HH, kind), "test": split([ROW, bad], kind)})
        with pytest.raises(RowError, match=r"^split 'test', row 1: chosen and rejected are the"):
            prepare(splits, tokenizer)
        with pytest.raises(ValueError, match=r"^split 'train': 8 of 8 pairs are too long"):
            prepare(splits, tokenizer, max_length=4)


def test_a_data_set_is_cached_and_several_processes_do_it(tokenizer, tmp_path):
    rows = [*HH, {**HH[0], "chosen": HH[0]["chosen"] + "!"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    data = datasets.load_from_disk(str(tmp_path / "data"))
    first = prepare(data, tokenizer)
    files = sorted(tmp_path.rglob("cache-*"))
    assert files
    again = prepare(data, small_tokenizers.beginning())
    assert sorted(tmp_path.rglob("cache-*")) == files
    assert again._fingerprint == first._fingerprint
    shorter = prepare(data, tokenizer, max_length=60)
    assert shorter._fingerprint != first._fingerprint
    assert list(prepare(data, tokenizer, num_proc=2)) == list(first) == prepare(rows, tokenizer)
    bad = datasets.Dataset.from_list([*rows, {**HH[0], "rejected": None}])
    with pytest.raises(RowError, match="row 9: missing the column 'rejected'"):
        prepare(bad, tokenizer, num_proc=2)


def test_what_a_warning_counts_is_counted_from_the_cache_too(tokenizer, tmp_path):
    rows = [ROW, LONG, SPANNING]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    data = datasets.load_from_disk(str(tmp_path / "data"))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            found = prepare(data, tokenizer, max_length=30, too_long="drop")
        texts = sorted(str(note.message) for note in noted)
        assert texts[0].startswith("1 of 3 pairs are too long (the first is row 1: the prompt has")
        assert texts[1].startswith("in 1 of 2 rows a token spans the end of the prompt")
        assert all(note.filename == __file__ for note in noted)
        assert len(found) == 2
    with pytest.warns(UserWarning, match="in 1 of 2 rows"):
        assert list(found) == prepare([ROW, SPANNING], tokenizer)


@pytest.mark.filterwarnings("ignore:in 1 of 1 rows")
@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_pairs_that_are_too_long_are_counted_and_refused(kind, tokenizer):
    rows = [ROW, LONG, LONG]
    match = r"^2 of 3 pairs are too long \(the first is row 1: the prompt .* Raise max_length, or"
    with pytest.raises(ValueError, match=match):
        prepare(made(rows, kind), tokenizer, max_length=30)
    answers = [{**ROW, "chosen": " yes" * 40}]
    match = (
        r"row 0: the longest answer has \d+ tokens, and max_length 30 leaves nothing of the prom"
    )
    with pytest.raises(ValueError, match=match):
        prepare(made(answers, kind), tokenizer, max_length=30, truncation_mode="keep_end")


def test_a_stream_says_so_as_it_is_read(tokenizer):
    rows = [ROW, LONG, SPANNING, {**ROW, "rejected": " yes"}]
    found = iter(prepare(made(rows, "iterable"), tokenizer, max_length=30, too_long="drop"))
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("default")
        read = [next(found) for _ in range(2)]
    first, second = (str(note.message) for note in noted if note.category is UserWarning)
    assert first.startswith("row 1 is dropped: the prompt has")
    assert second.startswith("in some rows a token spans")
    with pytest.warns(UserWarning, match="in 1 of 2 rows"):
        assert read == prepare([ROW, SPANNING], tokenizer)
    with pytest.raises(RowError, match="row 3: chosen and rejected are the same"):
        next(found)
    stopped = iter(prepare(made(rows, "iterable"), tokenizer, max_length=30))
    next(stopped)
    with pytest.raises(RowError, match="row 1: the prompt has"):
        next(stopped)


def test_nothing_left_and_nothing_there(tokenizer):
    with pytest.warns(UserWarning, match="1 of 1 pairs"):
        assert prepare([LONG], tokenizer, max_length=8, too_long="drop") == []
    assert prepare([], tokenizer) == []
    empty = datasets.Dataset.from_dict({"chosen": [], "rejected": []})
    assert len(prepare(empty, tokenizer)) == 0


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation(mode, tokenizer):
    row = {"prompt": "one two " * 5 + "so", "chosen": " yes" * 6, "rejected": " no"}
    (whole,), (cut,) = (
        prepare([row], tokenizer, max_length=n, truncation_mode=mode) for n in (None, 16)
    )
    assert len(cut["prompt_ids"]) + len(cut["chosen_ids"]) == 16
    assert cut["rejected_ids"] == whole["rejected_ids"]
    if mode == "keep_start":
        assert cut["prompt_ids"] == whole["prompt_ids"]
        assert whole["chosen_ids"][: len(cut["chosen_ids"])] == cut["chosen_ids"]
    else:
        assert cut["chosen_ids"] == whole["chosen_ids"]
        assert whole["prompt_ids"][-len(cut["prompt_ids"]) :] == cut["prompt_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_stay(kind, tokenizer):
    references = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}
    rows = [{**ROW, **references, "source": "a", "score": 3}, {**ROW, **references, "source": "b"}]
    for row in rows:
        row.setdefault("score", 4)
    (first, _) = prepare(made(rows, kind), tokenizer)
    assert set(first) == {*IDS, *references}
    (first, second) = prepare(made(rows, kind), tokenizer, keep_columns=("source", "prompt"))
    assert set(first) == {*IDS, *references, "source", "prompt"}
    assert (second["source"], second["prompt"], second["ref_chosen_logps"]) == ("b", "Say", -1.5)


def test_what_arrow_adds_to_a_data_set_changes_no_text(tokenizer):
    """Keys of other messages, calls and rows, with None for a value."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "say", "arguments": {"word": "yes"}}}
    rows = [
        {**TALK, "chat_template_kwargs": {"tone": "kind"}},
        {
            "prompt": [user("one")],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": None, "tool_calls": [other]}],
        },
        {
            "prompt": [user("two")],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [other]}],
            "rejected": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        },
    ]
    data = datasets.Dataset(pyarrow.Table.from_pylist(rows))  # `from_list` of old adds them too
    assert data[0]["chosen"] != rows[0]["chosen"]
    assert data[1]["chosen"] != rows[1]["chosen"]
    expected = prepare(rows, tokenizer)
    assert list(prepare(data, tokenizer)) == expected
    assert list(prepare(data.with_format("numpy"), tokenizer)) == expected
    assert "word" not in tokenizer.decode(expected[1]["chosen_ids"])


def test_a_transform_of_the_data_set_comes_first(tokenizer):
    def renamed(batch):
        return {"prompt": batch["question"], "chosen": batch["a"], "rejected": batch["b"]}

    rows = [{"question": ROW["prompt"], "a": ROW["chosen"], "b": ROW["rejected"]}]
    data = datasets.Dataset.from_list(rows).with_transform(renamed)
    found = prepare(data, tokenizer)
    assert found.format["type"] is None
    assert list(found) == prepare([ROW], tokenizer)


def test_tools_and_variables_of_the_call_and_of_the_row(tokenizer):
    def text(row, **options):
        return tokenizer.decode(prepare([row], tokenizer, **options)[0]["prompt_ids"])

    def add(a: int):
        """
        Adds.

        Args:
            a: a number
        """

    tool = {"type": "function", "function": {"name": "mul"}}
    assert "tools" not in text(TALK)
    assert '"add"' in text(TALK, tools=[add])
    assert '"mul"' in text(TALK, tools='[{"type": "function", "function": {"name": "mul"}}]')
    assert '"add"' in text({**TALK, "tools": None}, tools=[add])
    own = text({**TALK, "tools": [tool]}, tools=[add])
    assert '"mul"' in own
    assert '"add"' not in own
    assert "tone: kind" in text(TALK, chat_template_kwargs={"tone": "kind"})
    own = {**TALK, "chat_template_kwargs": {"tone": "curt"}}
    assert "tone: curt" in text(own, chat_template_kwargs={"tone": "kind"})
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert text(TALK, chat_template=template) == "[Be kind.][a][b][c]"


BAD = {
    "no column": ({"prompt": "a", "chosen": "b"}, "missing the column 'rejected'"),
    "no dict": ("prompt", "expected an object with the columns prompt, chosen, rejected"),
    "the same answers": ({**ROW, "chosen": " no"}, "chosen and rejected are the same"),
    "the same tokens": (
        {**ROW, "chosen": " no</s>"},
        "chosen and rejected are the same tokens",
    ),
    "prompts that differ": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "'chosen' and 'rejected' should begin with the same messages",
    ),
    "an image": ({**ROW, "images": ["a.png"]}, "'images' should be empty"),
    "tools, not JSON": ({**TALK, "tools": "add"}, "'tools' is a string that is not JSON"),
    "tools, no list": ({**TALK, "tools": '{"a": 1}'}, "'tools' should be a list of tools"),
    "tools to strings": ({**ROW, "tools": [{"name": "add"}]}, "'chosen' is a string, and tools go"),
    "variables": ({**TALK, "chat_template_kwargs": "a"}, "'chat_template_kwargs' should be a dict"),
    "a variable": (
        {**TALK, "chat_template_kwargs": {"add_generation_prompt": True}},
        "'chat_template_kwargs' should not have 'add_generation_prompt'",
    ),
    "one reference": ({**ROW, "ref_chosen_logps": -1.0}, "'ref_chosen_logps' should come with"),
    "no number": (
        {**ROW, "ref_chosen_logps": -1.0, "ref_rejected_logps": None},
        "'ref_rejected_logps' should be a finite number, got None",
    ),
    "no finite number": (
        {**ROW, "ref_chosen_logps": float("nan"), "ref_rejected_logps": -1.0},
        "'ref_chosen_logps' should be a finite number, got nan",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_is_refused_with_its_number_and_column(case, tokenizer):
    row, message = BAD[case]
    with pytest.raises(RowError, match=f"^row 1: {message}") as error:
        prepare([ROW, row], tokenizer)
    assert error.value.row == 1


TEMPLATES = {
    "strips the thoughts of an answer": (
        "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}</think>{% endif %}",
        "the chat template changes the prompt once it is answered by 'chosen': it has '/think>'",
    ),
    "counts": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "the chat template changes the prompt once it is answered",
    ),
    "says nothing": ("a", "'chosen' is empty, once it is through the chat template"),
    "says the same": (
        "{% for m in messages %}[{{ m.role }}]{% endfor %}",
        "chosen and rejected are the same, once through the chat template",
    ),
    "refuses": (
        "{{ raise_exception('roles should alternate') }}",
        "the chat template does not take the messages: roles should alternate",
    ),
    "adds to None": ("{{ none + 'a' }}", "the chat template does not take the messages"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_would_give_a_wrong_text_is_refused(case, tokenizer):
    template, message = TEMPLATES[case]
    with pytest.raises(RowError, match=f"^row 1: {message}"):
        prepare([ROW, TALK], tokenizer, chat_template=template)


def test_conversations_need_a_template():
    bare = small_tokenizers.beginning()
    bare.chat_template = None
    with pytest.raises(RowError, match="row 0: 'chosen' is a conversation, and the tokenizer has"):
        prepare([TALK], bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "ignore"}, "too_long should be one of error, drop, got 'ignore'"),
        ({"max_length": 0}, "max_length should be"),
        ({"truncation_mode": "left"}, "truncation_mode should be one of"),
        ({"tools": "add"}, "'tools' is a string that is not JSON"),
        ({"chat_template_kwargs": {"tools": []}}, "'chat_template_kwargs' should not have 'tools'"),
        ({"keep_columns": "prompt"}, "keep_columns should be a sequence of names"),
        ({"keep_columns": ("nothing",)}, "row 0: missing the column 'nothing' of keep_columns"),
        ({"keep_columns": ("prompt_ids",)}, "keep_columns should have columns of text"),
        ({"batched": True}, "a further option should be one of num_proc"),
        ({"num_proc": 2}, "num_proc: only a datasets.Dataset takes these"),
        ({"tools": [{"name": "add"}]}, "row 0: 'chosen' is a string, and tools go"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepare([ROW], tokenizer, **options)


def test_what_is_no_tokenizer():
    with pytest.raises(ValueError, match="tokenizer should be a tokenizer of transformers, got st"):
        prepare([ROW], "gpt2")


def test_nothing_is_said_of_what_is_as_it_should_be(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([ROW, TALK], tokenizer, max_length=100)
