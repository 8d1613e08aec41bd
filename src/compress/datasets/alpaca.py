"""`alpaca`: instructions with their answers (Taori et al., 2023), SliceGPT's text for instruction-tuned models.

Hub: tatsu-lab/alpaca, column `text`, the instruction in its prompt and the answer. It has one split, which is cut as
SliceGPT's code does: 80% train, 10% test, 10% validation, seed 42. In the folder of --data-dir: alpaca/*.json or
alpaca/*.jsonl, all records, each with a field `text`.
"""

from pathlib import Path

from compress.datasets._sources import column, hub_table, json_table, obtained, plain_files

REPOSITORY = "tatsu-lab/alpaca"
PLAIN = ("alpaca/*.json", "alpaca/*.jsonl")
LICENSE = "CC BY-NC 4.0"  # its answers are a model's of OpenAI, and not for commercial use
SEED = 42


def load(split: str, data_dir: Path | None = None) -> list[str]:
    files = plain_files(data_dir, PLAIN)
    table = json_table(files) if files else hub_table(REPOSITORY, data_dir, plain=PLAIN, split="train")
    with obtained("The data set alpaca cannot be split", "Give it at least ten records."):
        outer = table.train_test_split(test_size=0.2, seed=SEED)
        held_out = outer["test"].train_test_split(test_size=0.5, seed=SEED)
    splits = {"train": outer["train"], "test": held_out["train"], "validation": held_out["test"]}
    return column(splits[split], "text")
