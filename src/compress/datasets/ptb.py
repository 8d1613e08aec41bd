"""`ptb`: the Penn Treebank as prepared for language models (Mikolov et al., 2010). A row is a sentence.

Hub: ptb-text-only/ptb_text_only, column `sentence`, from the branch refs/convert/parquet, because the main branch is a
script, which `datasets` no longer runs. In the folder of --data-dir: ptb/ptb.{train,valid,test}.txt, a sentence a line.
"""

from pathlib import Path

from compress.datasets._sources import column, hub_table, plain_files, plain_lines

REPOSITORY = "ptb-text-only/ptb_text_only"
REVISION = "refs/convert/parquet"
FILE_SPLIT = {"train": "train", "validation": "valid", "test": "test"}


def load(split: str, data_dir: Path | None = None) -> list[str]:
    plain = (f"ptb/ptb.{FILE_SPLIT[split]}.txt",)
    files = plain_files(data_dir, plain)
    if files:
        return [line.strip() for line in plain_lines(files[0])]
    table = hub_table(REPOSITORY, data_dir, plain=plain, revision=REVISION, split=split)
    return column(table, "sentence")
