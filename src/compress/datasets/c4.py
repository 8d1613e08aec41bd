"""`c4`: the Colossal Clean Crawled Corpus, English (Raffel et al., arXiv 1910.10683). A row is a web page.

Hub: allenai/c4, column `text`, one shard of each split as in GPTQ and SparseGPT: en/c4-train.00000-of-01024.json.gz
and en/c4-validation.00000-of-00008.json.gz. There is no test split: `test` is the first 1100 pages of the validation
shard, the text GPTQ evaluates on (256 windows of 2048 tokens and a few more); GPTQ joins them with a blank instead.
In the folder of --data-dir: c4/c4-{train,validation}*.json.gz or .jsonl, of which the first is read.
"""

from pathlib import Path

from compress.datasets._sources import column, hub_table, json_table, plain_files

REPOSITORY = "allenai/c4"
SHARD = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
TEST_PAGES = 1100


def load(split: str, data_dir: Path | None = None) -> list[str]:
    part = "train" if split == "train" else "validation"
    plain = (f"c4/c4-{part}*.json.gz", f"c4/c4-{part}*.jsonl")
    files = plain_files(data_dir, plain)
    if files:
        table = json_table(files[:1])
    else:
        table = hub_table(REPOSITORY, data_dir, plain=plain, data_files={part: SHARD[part]}, split=part)
    pages = column(table, "text")
    return pages[:TEST_PAGES] if split == "test" else pages
