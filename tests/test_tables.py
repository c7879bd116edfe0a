"""A user's own data: what is recognised; how it is divided; and of every malformed file one sentence that helps."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from delora.data.dividing import divide, units
from delora.data.examples import DataError
from delora.data.tables import read

ROWS = [(f"text number {i}", "ab"[i % 2]) for i in range(40)]


def csv_(rows: Any = ROWS, header: str = "text,label", separator: str = ",") -> str:
    return header + "\n" + "".join(separator.join(map(str, row)) + "\n" for row in rows)


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(n: int = 40, **odd: Any) -> list[dict[str, Any]]:
    """Rows in which the third is odd."""
    rows: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in ROWS[:n]]
    rows[2] |= odd
    return rows


def chats(n: int = 30, **odd: Any) -> list[dict[str, Any]]:
    """Conversations, of which the third's answer is odd."""
    rows = []
    for i in range(n):
        answer = {"role": "assistant", "content": "Ahoy."} | (odd if i == 2 else {})
        rows.append({"messages": [{"role": "user", "content": f"Hello {i}."}, answer]})
    return rows


def parquet_(**columns: Any) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def saved(file: Path, content: Any) -> Path:
    if callable(content):
        content(file)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def folder(**files: str | bytes) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        place.mkdir()
        for name, content in files.items():
            saved(place / name.replace("__", "."), content)

    return make


WHOLE = parquet_(text=[text for text, _ in ROWS], label=[label for _, label in ROWS])
TEXTS = [text for text, _ in ROWS]

# name of the file: (what stands in it, arguments, what the sentence must say)
MALFORMED: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "empty.csv": ("", {}, ["is empty"]),
    "blank.csv": ("\n\n\n", {}, ["blank lines"]),
    "header.csv": ("text,label\n", {}, ["no rows"]),
    "latin.csv": (csv_().encode() + "caf\u00e9,a\n".encode("latin1"), {}, ["line 42", "not UTF-8", "save"]),
    "utf16-without-mark.csv": (csv_().encode("utf-16-le"), {}, ["line 1", "zero byte"]),
    "binary.csv": (bytes(range(256)) * 8, {}, ["line 1", "zero byte"]),
    "zip.csv": (b"PK\x03\x04\x00\x00" + b"\x00" * 99, {}, ["zero byte"]),
    "ragged.csv": (csv_([*ROWS[:2], ("one, two", "a")]), {}, ["row 4", "3 cells", "2 columns", "in quotes"]),
    "short.csv": (csv_([*ROWS[:2], ("alone",)]) + csv_(ROWS[3:]), {}, ["row 4", "1 cells"]),
    "open-quote.csv": (csv_([*ROWS[:2], ('"never closed', "a"), *ROWS[3:]]), {}, ["row 4", "never closed"]),
    "bad-quote.csv": (csv_([*ROWS[:2], ('"a "word" in it"', "a"), *ROWS[3:]]), {}, ["row 4", "doubled"]),
    "long-cell.csv": (csv_([*ROWS[:2], ("x" * 10_000_000, "a"), *ROWS[3:]]), {}, ["row 4", "1,000,000 characters"]),
    "long-cell.jsonl": (jsonl(labelled(text="x" * 10_000_000)), {}, ["row 3", "10,000,000 characters"]),
    "twice.csv": (csv_([(a, a, b) for a, b in ROWS], "text,text,label"), {}, ["row 1", "two columns are called 'text'"]),
    "twice.parquet": (
        lambda file: parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(TEXTS)] * 2, ["text", "text"]), file),
        {},
        ["two columns are called 'text'"],
    ),
    "twice.jsonl": (jsonl(labelled(3)) + '{"text": "a", "text": "b", "label": "a"}\n', {}, ["row 4", "'text' stands twice"]),
    "one-class.csv": (csv_([(text, "a") for text, _ in ROWS]), {}, ["'a' in all rows", "two classes"]),
    "all-different.csv": (
        csv_([(text, i) for i, (text, _) in enumerate(ROWS)]),
        {},
        ["40 different values", "kind=regression"],
    ),
    "no-label.csv": (csv_([(text, "") for text, _ in ROWS]), {}, ["row 2", "label 'label' is missing"]),
    "no-text.csv": (csv_([("", label) for _, label in ROWS]), {}, ["row 2", "text 'text' is empty"]),
    "nan-in-numbers.csv": (
        csv_([*((t, i / 4) for i, (t, _) in enumerate(ROWS)), ("last", "nan")]),
        {},
        ["row 42", "is no number"],
    ),
    "inf.jsonl": (
        jsonl([{"text": t, "label": i + 0.5} for i, t in enumerate(TEXTS)]) + '{"text": "last", "label": Infinity}',
        {},
        ["row 41", "no number"],
    ),
    "word-in-numbers.csv": (
        csv_([*((t, i / 4) for i, (t, _) in enumerate(ROWS)), ("last", "good")]),
        {},
        ["row 42", "'good' is no number"],
    ),
    "mixed-labels.jsonl": (jsonl(labelled(label=3)), {}, ["row 3", "label = 3", "row 1 is of another type"]),
    "mixed-texts.jsonl": (jsonl(labelled(text=3)), {}, ["row 3", "text = 3 is no text"]),
    "nested.jsonl": (jsonl(labelled(text={"de": "Hallo."})), {}, ["row 3", "is no text"]),
    "many-labels.jsonl": (jsonl(labelled(label=["a", "b"])), {}, ["row 3", "one label"]),
    "surrogate.jsonl": (jsonl(labelled(text="half \ud83d")), {}, ["row 3", "surrogate"]),
    "dict.json": (json.dumps({"data": labelled()}), {}, ["holds one object", "under 'data'"]),
    "columns.json": (json.dumps({"text": TEXTS, "label": TEXTS}), {}, ["holds one object"]),
    "number.json": ("3", {}, ["holds a int"]),
    "strings.json": (json.dumps(TEXTS), {}, ["row 1", "expected an object"]),
    "cut.json": (json.dumps(labelled(), indent=1)[:-20], {}, ["not valid JSON at line"]),
    "cut.jsonl": (jsonl(labelled(3)) + '{"text": "and th', {}, ["row 4", "not valid JSON"]),
    "list.jsonl": (json.dumps(labelled(), indent=1), {}, ["line 1", "name the file .json"]),
    "deep.json": ("[" * 100_000 + "]" * 100_000, {}, ["nested too deeply"]),
    "digits.jsonl": (jsonl(labelled(3)) + '{"text": "a", "label": ' + "9" * 5000 + "}\n", {}, ["row 4", "not valid JSON"]),
    "cut.parquet": (WHOLE[: len(WHOLE) // 2], {}, ["no Parquet file, or not a whole one"]),
    "csv.parquet": (csv_(), {}, ["no Parquet file"]),
    "bytes.parquet": (parquet_(text=[t.encode() for t in TEXTS], label=["a", "b"] * 20), {}, ["row 1", "is no text"]),
    "table.xlsx": (b"PK\x03\x04", {}, ["ends in .xlsx", ".csv"]),
    "table": (csv_(), {}, ["without an ending", ".csv"]),
    "no-data": (folder(readme__md="hello"), {}, ["a folder without data"]),
    "half-parts": (folder(train__csv=csv_(), more__csv=csv_()), {}, ["more.csv is of no part"]),
    "test-alone": (folder(test__csv=csv_()), {}, ["none to train on"]),
    "unlike": (folder(a__csv=csv_(), b__csv=csv_(header="text,queue")), {}, ["has no column 'label'"]),
    "label-in-test": (
        folder(train__csv=csv_(), test__csv=csv_([("another", "c"), ("one", "a")])),
        {},
        ["test.csv, row 2", "'c' is in no row of train"],
    ),
    "test-without-label": (folder(train__csv=csv_(), test__csv=csv_([("a", "b")], "text,id")), {}, ["no column 'label'"]),
    "same-parts": (folder(train__csv=csv_(), test__csv=csv_()), {}, ["row 2", "also stand in another part"]),
    "damaged-set": (folder(dataset_dict__json="{"), {}, ["damaged data set"]),
    "two-labels.csv": (
        csv_([(t, a, a) for t, a in ROWS], "text,queue,team"),
        {},
        ["'queue' (such as 'a')", "--text COLUMN --label COLUMN"],
    ),
    "no-names.csv": (csv_(ROWS[1:], "text number 0,7"), {"text": "text"}, ["no column 'text'"]),
    "typo.csv": (csv_(), {"text": "txt"}, ["did you mean 'text'"]),
    "same.csv": (csv_(), {"text": "label", "label": "label"}, ["cannot be both"]),
    "role.csv": (csv_(), {"columns": {"promt": "text"}}, ["did you mean 'prompt'"]),
    "group.csv": (csv_(), {"group": "user"}, ["no column 'user'"]),
    "one-group.csv": (csv_([(*row, "x") for row in ROWS], "text,label,user"), {"group": "user"}, ["1 groups", "too few"]),
    "few.csv": (csv_([("a b", "a"), ("a c", "b")] * 2), {}, ["2 different rows: too few"]),
    "kind.csv": (csv_(), {"kind": "clasification"}, ["did you mean 'classification'"]),
    "fraction.csv": (csv_([(t, i / 4) for i, t in enumerate(TEXTS)]), {"kind": "classification"}, ["different values"]),
    "role.jsonl": (jsonl(chats(role="robot")), {}, ["row 3, turn 2", "'robot' is none of"]),
    "silent.jsonl": (
        jsonl([{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(30)]),
        {},
        ["row 1", "nothing can be learned"],
    ),
    "said-number.jsonl": (jsonl(chats(content=7)), {}, ["row 3, turn 2 (assistant)", "is no text"]),
    "picture.jsonl": (jsonl(chats(content=[{"type": "image", "url": "a.png"}])), {}, ["row 3, turn 2", "no piece of text"]),
    "string-chat.jsonl": (jsonl([*chats(2), {"messages": "Hello."}]), {}, ["row 3", "expected a list of turns"]),
    "pairs.jsonl": (jsonl([{"chosen": "a", "rejected": "a"}] * 9), {}, ["row 1", "both answers are the same"]),
    "mixed-answers.jsonl": (
        jsonl([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": [{"role": "assistant", "content": "d"}]}]),
        {},
        ["row 2", "of another type"],
    ),
}


def test_there_are_forty_of_them():
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_gives_one_sentence_with_its_name_and_row(name, tmp_path):
    content, arguments, words = MALFORMED[name]
    file = saved(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(file, **arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500 + len(str(file))
    assert name in sentence or name == "kind.csv"  # there the argument is wrong, not the file
    for each in words:
        assert each in sentence, sentence


def test_what_is_not_there_is_said(tmp_path):
    for name, words in ((tmp_path / "no.csv", "there is no file"), ("no-such-data", "did not provide a data set")):
        with pytest.raises(DataError, match=words):
            read(name)


# ---------------------------------------------------------------- what is told, and left out


@pytest.mark.parametrize(
    ("rows", "words", "left"),
    [
        (labelled(text=" "), "row 3: the text 'text' is empty; left out", 39),
        (labelled(label=None), "row 3: the label 'label' is missing; left out", 39),
        (labelled(label=float("nan")), "row 3: the label 'label' is missing; left out", 39),
        (labelled(text="text number 0", label="a"), "row 3: repeats another row; 1 such duplicates are kept", 40),
        (labelled(text="text number 0", label="b"), "1 texts stand under several labels", 40),
        ([*labelled(), {"text": "new", "label": "c"}], "not in every part, having few rows: 'c'", 41),
        ([*labelled(), *({"text": f"new {i}", "label": "A"} for i in range(9))], "'A' and 'a' differ in case", 49),
        ([*labelled(), *({"text": f"new {i}", "label": "NA"} for i in range(9))], "'NA' is taken as the name of a class", 49),
        (chats(content=""), "row 3: no turn of the assistant's, or an empty one", 29),
    ],
)
def test_what_is_odd_is_counted_and_told(rows, words, left, tmp_path):
    table = read(saved(tmp_path / "odd.jsonl", jsonl(rows)))
    assert any(words in sentence for sentence in table.told), table.told
    assert sum(table.sizes().values()) == left
    assert not [sentence for sentence in read(saved(tmp_path / "plain.jsonl", jsonl(labelled()))).told if words in sentence]


# ---------------------------------------------------------------- what just works


def test_every_form_of_the_same_rows_is_read_alike(tmp_path):
    """The same examples, as six formats, two encodings, a folder and a saved data set: the user's strings, never a guess."""
    rows = [(text, ("01", "NA")[i % 2]) for i, (text, _) in enumerate(ROWS)]
    dicts = [{"text": text, "label": label} for text, label in rows]
    text = csv_(rows)
    forms: dict[str, Any] = {
        "a.csv": text,
        "bom.csv": text.encode("utf-8-sig"),
        "utf16.csv": text.encode("utf-16"),
        "crlf.csv": text.replace("\n", "\r\n"),
        "semicolon.csv": csv_(rows, "text;label", ";"),
        "tab.csv": csv_(rows, "text\tlabel", "\t"),
        "a.tsv": csv_(rows, "text\tlabel", "\t"),
        "a.json": json.dumps(dicts),
        "lines.json": jsonl(dicts),
        "a.jsonl": jsonl(dicts),
        "a.parquet": parquet_(text=[t for t, _ in rows], label=[x for _, x in rows]),
        "folder": folder(a__csv=csv_(rows[:20]), b__csv=csv_(rows[20:])),
        "set": lambda file: datasets.Dataset.from_list(dicts).save_to_disk(file),
        "named": lambda file: (
            datasets.Dataset.from_list(dicts).cast_column("label", datasets.ClassLabel(names=["NA", "01"])).save_to_disk(file)
        ),
    }
    expected = read(saved(tmp_path / "expected.csv", text))
    assert expected.labels == ("01", "NA")
    for name, content in forms.items():
        table = read(saved(tmp_path / name, content))
        assert (table.kind, table.columns, table.labels) == (expected.kind, expected.columns, expected.labels), name
        assert {part: list(rows) for part, rows in table.parts.items()} == {
            part: list(rows) for part, rows in expected.parts.items()
        }, name


@pytest.mark.parametrize(
    ("rows", "kind", "first"),
    [
        ([{"sentence1": f"a {i}", "sentence2": "b", "label": i % 3} for i in range(30)], "classification", None),
        ([{"text": f"a {i}", "score": i / 7} for i in range(30)], "regression", None),
        ([{"text": f"a {i}"} for i in range(30)], "text", None),
        (chats(), "chat", {"role": "assistant", "content": "Ahoy."}),
        (
            [{"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "Yo."}]} for i in range(30)],
            "chat",
            {"role": "assistant", "content": "Yo."},
        ),
        ([{"prompt": f"a {i}", "completion": "b"} for i in range(30)], "completion", None),
        ([{"prompt": f"a {i}", "chosen": "b", "rejected": "c"} for i in range(30)], "preference", None),
    ],
)
def test_the_kinds_are_recognised(rows, kind, first, tmp_path):
    table = read(saved(tmp_path / "mine.jsonl", jsonl(rows)))
    assert table.kind == kind
    assert kind in table.told[0]
    if first is not None:
        assert table.parts["test"][0]["messages"][-1] == first


def test_alpacas_rows_become_prompts_with_completions(tmp_path):
    rows = [{"instruction": f"Do {i}.", "input": "" if i % 2 else "this", "output": "Done."} for i in range(30)]
    table = read(saved(tmp_path / "alpaca.json", json.dumps(rows)))
    assert table.kind == "completion"
    for row in table.parts["train"]:
        assert row["prompt"] == (f"{row['instruction']}\n\nthis" if row["input"] else row["instruction"])


def test_turns_keep_their_keys_and_get_no_others(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [
        {
            "tools": [{"name": "f"}],
            "messages": [
                {"role": "user", "content": f"{i}"},
                *([call] if i % 2 else []),
                {"role": "assistant", "content": "Yo."},
            ],
        }
        for i in range(30)
    ]
    table = read(saved(tmp_path / "tools.jsonl", jsonl(rows)))
    for row in table.parts["train"]:
        assert row["tools"] == [{"name": "f"}]
        assert [set(turn) for turn in row["messages"] if "tool_calls" not in turn] == [{"role", "content"}] * 2
        assert all(turn["tool_calls"] == call["tool_calls"] for turn in row["messages"] if "tool_calls" in turn)


def test_columns_are_found_by_their_values_or_by_what_the_user_says(tmp_path):
    rows = [(i, "ab"[i % 2], f"what {i} says", i % 5) for i in range(40)]
    file = saved(tmp_path / "mine.csv", csv_([row[:3] for row in rows], "id,team,words"))
    assert read(file).columns == {"text": "words", "label": "team"}
    assert "left out: 'id'" in read(file).told[0]
    more = saved(tmp_path / "more.csv", csv_(rows, "id,team,words,day"))
    assert read(more, text="words", label="day").labels == ("0", "1", "2", "3", "4")
    frage = saved(tmp_path / "frage.csv", csv_([(f"f {i}", "a a") for i in range(30)], "frage,antwort"))
    table = read(frage, columns={"prompt": "frage", "completion": "antwort"})
    assert (table.kind, table.parts["train"][0]["completion"]) == ("completion", "a a")


def test_a_folders_parts_stay_what_they_are_but_for_what_they_share(tmp_path):
    """No text is both trained on and tested on; what a folder lacks is taken out of its training rows."""
    files = {"train__csv": csv_(ROWS[:30]), "test__csv": csv_(ROWS[28:36])}
    table = read(saved(tmp_path / "parts", folder(**files)))
    parts = {part: set(rows["text"]) for part, rows in table.parts.items()}
    assert parts["test"] == {text for text, _ in ROWS[28:36]}
    assert parts["train"] | parts["validation"] == {text for text, _ in ROWS[:28]}
    assert not parts["train"] & parts["validation"]
    assert any("2 such rows are left out of train" in sentence for sentence in table.told)


# ---------------------------------------------------------------- dividing


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.one_of(st.none(), st.integers(0, 6))), min_size=1, max_size=60
    ),
    st.integers(0, 5),
)
def test_no_text_and_no_group_is_in_two_parts_and_no_class_outside_training_alone(rows, seed):
    texts, labels, groups = zip(*rows, strict=True)
    chosen = divide(units(texts, groups), labels, seed=seed)
    assert chosen == divide(units(texts, groups), labels, seed=seed)
    for key in (texts, groups):
        places: dict[Any, set[str]] = {}
        for value, part in zip(key, chosen, strict=True):
            if value is not None:
                places.setdefault(value, set()).add(part)
        assert all(len(each) == 1 for each in places.values())
    assert {label for label, part in zip(labels, chosen, strict=True) if part == "train"} == set(labels)


def test_classes_keep_their_shares_and_another_seed_divides_anew():
    labels = ["a"] * 200 + ["b"] * 50
    chosen = divide(range(250), labels)
    for label, n in (("a", 200), ("b", 50)):
        parts = [part for part, each in zip(chosen, labels, strict=True) if each == label]
        assert [parts.count(part) for part in ("train", "validation", "test")] == [n * 0.8, n * 0.1, n * 0.1]
    assert divide(range(250), labels, seed=1) != chosen
