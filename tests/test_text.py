"""Text of files, folders and rows: what is read, what is left out and named, what is refused."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

import moonshot
from moonshot.errors import ArgumentError
from moonshot.files.text import read_text, read_texts

DEMO = Path(moonshot.__file__).parent / "demo"
ROWS = [{"id": 1, "text": "one,\n\u2028two"}, {"id": 2, "text": None}, {"id": 3, "text": "three"}]
TEXT = "one,\n\u2028two\n\nthree"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}],
    [{"role": "user", "content": "Bye."}],
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(path, name, rows):
    """A file with these rows, of the kind that its name says."""
    file = path / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif name.endswith((".csv", ".tsv")):
        datasets.Dataset.from_list(rows).to_pandas().to_csv(
            file, index=False, sep="\t" if "tsv" in name else ","
        )
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(lines(rows).encode()))
    else:
        file.write_text(json.dumps(rows) if name == "list.json" else lines(rows), encoding="utf-8")
    return file


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


NAMES = ["a.jsonl", "a.ndjson", "lines.json", "list.json", "a.csv", "a.tsv", "a.parquet", "a.json.gz"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_kind_are_the_same_text(tmp_path, name):
    assert read_text(str(written(tmp_path, name, ROWS))) == TEXT


@pytest.mark.parametrize("name", NAMES)
def test_a_column_by_name(tmp_path, name):
    rows = [{"id": "x", "body": row["text"]} for row in ROWS]
    file = written(tmp_path, name, rows)
    assert read_texts(str(file), column="body").text == TEXT
    with pytest.raises(
        ArgumentError, match=f"{file} has no column of text, its columns are id, body.*--text-column"
    ):
        read_texts(str(file))
    with pytest.raises(ArgumentError, match="no column 'bodi'.*did you mean body?"):
        read_texts(str(file), column="bodi")


def test_a_document_of_a_csv_may_be_long(tmp_path):
    text = "word " * 30000 + "\n end"
    assert read_text(str(written(tmp_path, "a.csv", [{"text": text}]))) == text


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.parquet"])
def test_chats_are_written_by_the_template(tmp_path, tokenizer, name):
    file = written(tmp_path, name, [{"messages": chat} for chat in CHATS])
    with pytest.raises(ArgumentError, match="chat 1 of .* needs a chat template"):
        read_texts(str(file), tokenizer)
    tokenizer.chat_template = TEMPLATE
    begin = tokenizer.bos_token or ""
    found = read_texts(str(file), tokenizer).text
    assert found == f"{begin}<user>Hello?<assistant>Yes.{begin}<user>Bye."


def test_chats_of_a_dataset(tmp_path, tokenizer, dataset_cache):
    (tmp_path / "chats").mkdir()
    rows = [{"id": "a", "messages": chat} for chat in CHATS]
    written(tmp_path / "chats", "train.parquet", rows)
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    found = read_texts(f"{tmp_path / 'chats'}::train", tokenizer)
    assert found.text == "<user>Hello?<assistant>Yes.<user>Bye."


def test_a_chat_s_beginning_is_not_doubled(tmp_path, tokenizer):
    file = written(tmp_path, "a.jsonl", [{"messages": chat} for chat in CHATS])
    token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.chat_template, tokenizer.bos_token = TEMPLATE, token

    class Adding:
        """The tokenizer, which begins every text with its token."""

        bos_token, bos_token_id, chat_template = token, 0, TEMPLATE
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text):
            return {"input_ids": [0]}

    assert read_texts(str(file), tokenizer).text.startswith(f"{token}<user>Hello?")
    assert read_texts(str(file), Adding()).text.startswith("<user>Hello?")


def test_messages_that_the_template_does_not_know(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = written(tmp_path, "a.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.raises(ArgumentError, match="chat 1 of .*roles must alternate"):
        read_texts(str(file), tokenizer)


def test_files_of_a_folder_that_are_no_text_are_named(tmp_path):
    written(tmp_path, "b.jsonl", ROWS)
    (tmp_path / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "about.json").write_text('{"name": "x"}')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "empty.csv").write_text("")
    found = read_texts(str(tmp_path))
    assert found.text == f"first\n\n{TEXT}"
    assert len(found.skipped) == 3
    for name, reason in zip(found.skipped, ("no column of text", "no rows", "no text"), strict=True):
        assert str(tmp_path) in name and reason in name
    only = tmp_path / "picture.png"
    with pytest.raises(ArgumentError, match=f"{only} is no text"):
        read_text(str(only))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "caf\xe9".encode("latin-1"), "is not UTF-8 text: byte 3 is 0xe9"),
        ("a.csv", "text\ncaf\xe9".encode("latin-1"), "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2, cannot be read"),
        ("a.json", b'[{"text": "a"}', "a.json, line 1, cannot be read"),
        ("a.csv", b"text\nHello, you\n", "a.csv cannot be read: line 2 has another number of fields"),
        ("a.csv", b'text\n"Hello', "a.csv cannot be read: unexpected end"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read"),
        ("a.json.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20], "a.json.gz cannot be read"),
        ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read"),
        ("a.jsonl", b'{"text": 5}', "has a column of int, not of text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.csv", b"text\n", "holds no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    """In a folder too, where it is no file of another kind: half of one's data is not left out in silence."""
    (tmp_path / name).write_bytes(content)
    for data in (tmp_path / name, tmp_path):
        with pytest.raises(ArgumentError, match=words) as caught:
            read_text(str(data))
        assert "\n" not in str(caught.value)
