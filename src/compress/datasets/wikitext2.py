"""`wikitext2`: WikiText-2, raw, version 1 (Merity et al., arXiv 1609.07843), the text of most published perplexities.

Hub: Salesforce/wikitext, wikitext-2-raw-v1, column `text`. A row is a line of the original file with its line end; a
blank line is the row "". In the folder of --data-dir: wikitext-2/wiki.{train,valid,test}.raw, else any
wikitext-2/wiki.{train,valid,test}*.raw (a part of the split).
"""

from pathlib import Path

from compress.datasets._sources import column, hub_table, plain_files, plain_lines

REPOSITORY = "Salesforce/wikitext"
FILE_SPLIT = {"train": "train", "validation": "valid", "test": "test"}


def load(split: str, data_dir: Path | None = None) -> list[str]:
    plain = tuple(f"wikitext-2/wiki.{FILE_SPLIT[split]}{suffix}" for suffix in (".raw", "*.raw"))
    files = plain_files(data_dir, plain)
    if files:
        return [line if line.strip() else "" for line in plain_lines(files[0])]
    table = hub_table(REPOSITORY, data_dir, plain=plain[:1], name="wikitext-2-raw-v1", split=split)
    return column(table, "text")
