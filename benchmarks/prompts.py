"""Ten prompts through a dense model and through compressed ones: what each writes, in its words.

    python benchmarks/prompts.py --model MODEL "NAME=FOLDER or FILE.gguf" ... [--write docs/prompts.md]

Greedy, 48 new tokens at most, nothing edited or left out. Where the tokenizer has a chat template, each prompt is the
first message of a chat. GGUF files are run by llama.cpp itself (the extra `llamacpp`), others by `compress.load`.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import marked
import torch
from transformers import AutoTokenizer

from compress.checkpoints.card import Untrusted
from compress.evaluation.footprint import bytes_on_disk
from compress.evaluation.generation import NEW_TOKENS, Sampling, generate
from compress.evaluation.llamacpp import LlamaCpp
from compress.models.soundness import evaluating
from compress.models.stored_loading import open_model

PROMPTS = {
    "a story": "Write the first sentences of a story about a lighthouse keeper.",
    "a fact": "What is the capital of France, and on which river does it lie?",
    "code": "Write a Python function that reverses a string.",
    "arithmetic": "What is 17 plus 25? Show how you work it out.",
    "a list": "List five things to take along on a camping trip.",
    "an explanation": "Explain to a child why the sky is blue.",
    "a translation": "Translate into French: The cat sleeps on the chair.",
    "a summary": (
        "Say in one sentence: Bees visit flowers for their nectar. On the way they carry pollen from one flower to the "
        "next. Without it many plants could not make seeds."
    ),
    "a letter": "Write a short and polite email that declines an invitation to a meeting.",
    "a question of sense": "Which is heavier, a kilogram of feathers or a kilogram of iron? Why?",
}


def encoded(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def written(model: Path, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
    """What a model goes on with after each prompt, in its own words."""
    if model.suffix == ".gguf":
        engine = LlamaCpp(model, context=max(map(len, prompts)) + NEW_TOKENS, vocabulary=len(tokenizer))
        return [engine.write(ids, NEW_TOKENS) for ids in prompts]
    loaded = open_model(model, dtype=torch.float32, device=torch.device("cpu"))
    with evaluating(loaded):
        return [text for ids in prompts for text in generate([ids], loaded, tokenizer, Sampling(), NEW_TOKENS)]


def size(model: Path) -> str:
    found = model.stat().st_size if model.is_file() else bytes_on_disk(model)
    return f"{found / 1e6:.1f} MB"


def page(models: dict[str, Path], texts: dict[str, list[str]], command: str, *, is_chat: bool) -> str:
    engines = {name: "llama.cpp" if model.suffix == ".gguf" else "transformers" for name, model in models.items()}
    used = f"torch {version('torch')}, transformers {version('transformers')}"
    if "llama.cpp" in engines.values():
        used += f", xllamacpp {version('xllamacpp')}"
    asked = "Each prompt is the first message of a chat." if is_chat else "Each prompt is given as it is."
    lines = [f"Date: {date.today()}. {used}, on a CPU. {asked}", "", f"    {command}", ""]
    lines += ["| model | bytes | run by |", "|---|---|---|"]
    lines += [f"| {name} | {size(model)} | {engines[name]} |" for name, model in models.items()]
    for number, (title, prompt) in enumerate(PROMPTS.items()):
        lines += ["", f"## {title.capitalize()}", "", f"> {prompt}"]
        for name in models:
            lines += ["", f"{name}:", "", Untrusted(texts[name][number]).block]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("results", nargs="+", metavar="NAME=RESULT")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    models = {"dense": options.model}
    for result in options.results:
        name, _, place = result.rpartition("=")
        models[name or Path(place).stem] = Path(place)
    if options.write:
        marked.check(options.write, "prompts")
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    prompts = [encoded(tokenizer, prompt) for prompt in PROMPTS.values()]
    texts = {}
    for name, model in models.items():
        texts[name] = written(model, tokenizer, prompts)
        sys.stderr.write(f"{name}: {len(texts[name])} prompts\n")
    words = " ".join(f"'{name}={model.name}'" for name, model in list(models.items())[1:])
    command = f"python benchmarks/prompts.py --model MODEL {words} --write docs/prompts.md"
    text = page(models, texts, command, is_chat=bool(tokenizer.chat_template))
    sys.stdout.write(text)
    if options.write:
        marked.write(text, options.write, "prompts")


if __name__ == "__main__":
    main()
