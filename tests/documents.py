"""Documents of tasks and problems of HumanEval, and the files that they come in."""

import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"query": "Question: why?\n", "choices": ["so", "because it is", "é"], "gold": 1},
    {"query": "Question: 1 + 1 \n", "choices": ["2", "three"], "gold": 0},
    {
        "query": "Question: a long one, of which the model cannot read the start, no\n",
        "choices": ["no", "y"],
        "gold": 1,
    },
    {"query": "Question: same answers\n", "choices": ["a", "a"], "gold": 0},
]
PASSAGES = [
    {"query": "Passage: x is y.\nQuestion: is x y?", "choices": ["no", "yes"], "gold": 1},
    {"query": "Passage: x is y.\nQuestion: is y x?", "choices": ["no", "yes"], "gold": 0},
]
PRONOUNS = [
    {"context_options": ["Ann saw Bo because Ann", "Ann saw Bo because Bo"], "continuation": "looked.", "gold": 0},
    {"context_options": ["it rained so the dog", "it rained so the cat"], "continuation": ".", "gold": 1},
]
WORDS = [
    {"context": "one two three", "continuation": "four"},
    {"context": "to be or not to", "continuation": "be"},
    {"context": "x", "continuation": "y"},
]
TASKS: dict[str, list[dict[str, Any]]] = {
    "piqa": QUESTIONS[1:],
    "arc_easy": QUESTIONS,
    "hellaswag": QUESTIONS,
    "boolq": PASSAGES,
    "winogrande": PRONOUNS,
    "lambada_openai": WORDS,
    "mine": QUESTIONS,
    "my_pronouns": PRONOUNS,
    "my_words": WORDS,
}


def write_task(folder: Path, name: str, documents: list[Any]) -> Path:
    file = folder / "tasks" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    file.write_text("".join(lines), encoding="utf-8")
    return file


PROBLEM = {
    "task_id": "Test/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 3\n",
}


def write_problems(folder: Path, content: bytes, name: str = "HumanEval.jsonl") -> None:
    (folder / "humaneval").mkdir(exist_ok=True)
    (folder / "humaneval" / name).write_bytes(content)
