"""Data sets in the layout that they have on the hub, and a task of lm-eval, small enough for a test."""

import gzip
import json

import datasets

CONFIG = "wikitext-2-raw-v1"


def wikitext(root, train, test):
    """Salesforce/wikitext below a folder, with the lines of two splits."""
    folder = root / "Salesforce" / "wikitext"
    (folder / CONFIG).mkdir(parents=True)
    for split, lines in (("train", train), ("test", test)):
        file = folder / CONFIG / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": lines}).to_parquet(file)
    entries = "".join(f"  - split: {split}\n    path: {CONFIG}/{split}-*\n" for split in ("train", "test"))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {CONFIG}\n  data_files:\n{entries}---\n", encoding="utf-8"
    )


def c4(root, train=(), validation=()):
    """The first files of allenai/c4 below a folder, with these documents."""
    folder = root / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    for name, texts in (
        ("c4-train.00000-of-01024", train),
        ("c4-validation.00000-of-00008", validation),
    ):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            for text in texts:
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
                file.write(json.dumps(row) + "\n")


TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def next_words(folder):
    """A folder with the task next_word of lm-eval; its rows."""
    folder.mkdir()
    rows = [
        {"question": "import", "choices": ["os", "zebra"], "answer": 0},
        {"question": "def", "choices": ["(", "main("], "answer": 1},
        {"question": "for i in", "choices": ["range", "import"], "answer": 0},
        {"question": "return", "choices": ["None", "else"], "answer": 0},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "next_word.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return rows
