"""Tasks by lm-eval: local documents are asked as those of the hub, and scores agree with a loop over tokens."""

import json
import math
import sys
from typing import Any

import pytest
import torch

from cli_runner import invoke
from compress.checkpoints.quality import Metric, TaskScore
from compress.datasets.texts import read_documents
from compress.errors import NumericalError, Unavailable, UsageError
from compress.evaluation import tasks
from compress.evaluation.tasks import (
    KNOWN,
    LoadedTask,
    averages,
    load_hub_task,
    load_local_task,
    read_score,
    score_tasks,
)
from documents import PASSAGES, QUESTIONS, TASKS, WORDS, write_task
from tiny import POSITIONS, tiny_model, tiny_tokenizer, write_model

# lm-eval and what it imports warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

ANSWERS = "\nAnswer:"


def asked(task: str, document: dict[str, Any]) -> list[tuple[str, str]]:
    """What the model is to be asked: a context and a continuation for each answer."""
    if "query" in document:
        context = document["query"]
        if task in ("piqa", "arc_easy", "arc_challenge"):
            context = context.removesuffix("\n") + ANSWERS
        if task == "boolq":
            context = context.removeprefix("Passage: ") + ANSWERS
        return [(context, f" {choice}") for choice in document["choices"]]
    if "gold" in document:
        return [(context, f" {document['continuation']}") for context in document["context_options"]]
    return [(document["context"], f" {document['continuation']}")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def questions_of(part: Any) -> list[tuple[str, str]]:
    part.build_all_requests()
    return [instance.args for instance in part.instances]


# Rows of the hub's data sets, and the same documents as local files have them.
HUB: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "piqa": (
        "validation",
        {"goal": "wash it ", "sol1": "with soap", "sol2": "with sand, twice", "label": 1},
        {"query": "Question: wash it \n", "choices": ["with soap", "with sand, twice"], "gold": 1},
    ),
    "arc_easy": (
        "test",
        {"question": "Why?", "choices": {"text": ["so", "no", "é"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"query": "Question: Why?", "choices": ["so", "no", "é"], "gold": 2},
    ),
    "boolq": (
        "validation",
        {"passage": "x is y.\nQuestion: z?", "question": "is x y", "label": 1},
        {"query": "Passage: x is y.\nQuestion: z?\nQuestion: is x y?", "choices": ["no", "yes"], "gold": 1},
    ),
    "winogrande": (
        "validation",
        {"sentence": "Ann saw Bo, so _ looked.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {"context_options": ["Ann saw Bo, so Ann", "Ann saw Bo, so Bo"], "continuation": "looked.", "gold": 1},
    ),
    "lambada_openai": ("test", {"text": "one two three four"}, {"context": "one two three", "continuation": "four"}),
    "hellaswag": (
        "validation",
        {"activity_label": "Go", "ctx_a": "He", "ctx_b": "then", "endings": ["runs [x]", "sits"], "label": "1"},
        {"query": "Go: He Then", "choices": ["runs ", "sits"], "gold": 1},
    ),
}
HUB["arc_challenge"] = HUB["arc_easy"]


@pytest.mark.parametrize("name", KNOWN)
def test_local_documents_are_asked_as_the_hubs(name, monkeypatch):
    """The same requests to the letter, the same metrics and the same answers taken for right."""
    import datasets

    split, row, document = HUB[name]
    hub = datasets.DatasetDict({each: datasets.Dataset.from_list([row]) for each in {"train", split}})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    (theirs,) = load_hub_task(name, [])
    ours = load_local_task(name, [document])
    assert (theirs.source, ours.source) == ("hub", "files")
    hubs, local = theirs.parts[name], ours.parts[name]
    assert questions_of(hubs) == questions_of(local)
    assert hubs.config.metric_list == local.config.metric_list
    number = theirs.num_requests(None)
    for best in range(number):
        likelihoods = [(-1.0 if each == best else -9.0, each == best) for each in range(number)]
        given = [
            hubs.process_results(hubs.eval_docs[0], likelihoods),
            local.process_results(local.eval_docs[0], likelihoods),
        ]
        assert given[0] == given[1]


def slow_likelihood(model: Any, tokens: list[int], first: int) -> tuple[float, bool]:
    """Of the tokens from number `first` on, one forward pass a token, of the prefix alone."""
    total, greedy = 0.0, True
    for place in range(first, len(tokens)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[:place]])).logits[0, -1].tolist()
        highest = max(logits)
        total += logits[tokens[place]] - highest - math.log(math.fsum(math.exp(x - highest) for x in logits))
        greedy &= logits.index(highest) == tokens[place]
    return total, greedy


def slow_metrics(task: str, model: Any, tokenizer: Any) -> dict[str, float]:
    measured: dict[str, list[float]] = {"acc": [], "acc_norm": [], "ln p": []}
    for document in TASKS[task]:
        scores = []
        for context, continuation in asked(task, document):
            whole = tokenizer.encode(context + continuation)
            start = max(0, len(whole) - POSITIONS - 1)
            scores.append(slow_likelihood(model, whole[start:], len(tokenizer.encode(context)) - start))
        values = [value for value, _ in scores]
        if "gold" in document:
            measured["acc"].append(values.index(max(values)) == document["gold"])
        else:
            measured["acc"].append(scores[0][1])
            measured["ln p"].append(values[0])
        if "choices" in document and task != "boolq":
            values = [value / len(choice) for value, choice in zip(values, document["choices"], strict=True)]
            measured["acc_norm"].append(values.index(max(values)) == document["gold"])
    means = {name: sum(values) / len(values) for name, values in measured.items() if values}
    return {
        "perplexity" if name == "ln p" else name: math.exp(-m) if name == "ln p" else m for name, m in means.items()
    }


def test_scores_against_a_loop(tokenizer):
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=1)
    loaded = [load_local_task(name, documents) for name, documents in TASKS.items()]
    done: list[int] = []
    scores = score_tasks(loaded, model, tokenizer, batch_size=3, on_answer=done.append)
    assert [score.task for score in scores] == list(TASKS)
    for score in scores:
        found = {name: each.value for name, each in score.metrics.items()}
        assert found == pytest.approx(slow_metrics(score.task, model, tokenizer), rel=1e-5), score.task
        assert (score.source, score.documents) == ("files", len(TASKS[score.task]))
    assert sum(done) == sum(task.num_requests(None) for task in loaded)
    (limited,) = score_tasks(loaded[:1], model, tokenizer, batch_size=3, limit=2)
    assert limited.documents == 2


def test_the_averages_of_the_papers():
    """SLiM's of acc; SliceGPT's of acc_norm, with acc for WinoGrande, which has no other."""

    def score(**values: float) -> TaskScore:
        metrics = {name: Metric(value=value, standard_error=None) for name, value in values.items()}
        return TaskScore(task="a", source="files", documents=9, metrics=metrics)

    scores = [score(acc=0.5, acc_norm=0.7), score(acc=0.3)]
    assert averages(scores) == {"acc": pytest.approx(0.4), "acc_norm": pytest.approx(0.5)}
    assert averages([*scores, score(word_perplexity=9.0)]) == {"acc": None, "acc_norm": None}
    assert averages([]) == {"acc": None, "acc_norm": None}


def test_what_is_read_of_lm_evals_result():
    found = {
        "results": {
            "gsm": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,flexible": 0.6},
            "part": {"acc,none": 0.1},
        },
        "groups": {"all": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "all"}},
        "n-samples": {name: {"effective": n} for name, n in (("gsm", 2), ("part", 4), ("other", 5))},
    }

    def score(name: str, *parts: str) -> TaskScore:
        return read_score(LoadedTask(name, "hub", None, dict.fromkeys(parts or (name,))), found)

    assert score("gsm").metrics == {
        "exact_match (strict)": Metric(value=0.5, standard_error=0.1),
        "exact_match (flexible)": Metric(value=0.6, standard_error=None),
    }
    assert score("all", "part", "other") == TaskScore(
        task="all", source="hub", documents=9, metrics={"acc": Metric(value=0.25, standard_error=0.01)}
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Three tasks with their data in files, a group of two and a tag of two, in the place of all of lm-eval's."""
    from lm_eval.tasks import TaskManager

    for name in ("one", "two", "three"):
        file = write_task(tmp_path / "data", name, QUESTIONS)
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\n{'tag: odd' if name != 'two' else ''}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {file}}}}}\noutput_type: multiple_choice\n"
            "doc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        )
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(tasks, "task_index", lambda _folder: manager)


def test_groups_and_tags(index, tokenizer):
    """A group has a score, a tag one of each task."""
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=1)
    loaded = [*load_hub_task("both", []), *load_hub_task("odd", [])]
    assert [task.num_requests(None) for task in loaded] == [18, 9, 9]
    scores = score_tasks(loaded, model, tokenizer, batch_size=8)
    assert [(score.task, score.documents) for score in scores] == [("both", 8), ("one", 4), ("three", 4)]
    assert scores[0].metrics["acc"].value == scores[1].metrics["acc"].value


def test_a_task_that_runs_what_the_model_writes(index, monkeypatch):
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.UNSAFE_CODE", True, raising=False)
    with pytest.raises(UsageError, match=r"^lm-eval's task 'both' runs code that the model writes\. Use --humaneval"):
        load_hub_task("both", [])


def test_a_task_that_nobody_has(index):
    with pytest.raises(UsageError, match=r"^lm-eval has no task 'treee'\. Did you mean 'three'\? `lm-eval ls tasks`"):
        load_hub_task("treee", [])
    with pytest.raises(UsageError, match=r"Did you mean 'my_own'\? Files: my_own\."):
        load_hub_task("my_onw", ["my_own"])


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    write_model(tmp_path / "model", "llama", dtype=torch.float32)
    ran = invoke("eval", "--tasks", "piqa,nothing", "--model", tmp_path / "model")
    assert (ran.code, ran.faults) == (2, ["--tasks needs the package lm-eval: pip install 'compress-llm[tasks]'"])


def test_a_likelihood_that_is_no_number(tokenizer):
    model = tiny_model("llama", num_hidden_layers=2, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(
        NumericalError,
        match=r"likelihood of ' (four|be|y)' is no number: .* first in the weights of model\.layers\.1\.mlp\.up_proj",
    ):
        score_tasks([load_local_task("lambada_openai", WORDS)], model, tokenizer, batch_size=1)


@pytest.mark.parametrize(
    ("name", "documents", "reason"),
    [
        (
            "boolq",
            [*PASSAGES, PASSAGES[0] | {"choices": ["yes", "no"]}],
            "document 3 does not fit the task: the choices must be",
        ),
        ("lambada_openai", [WORDS[0] | {"continuation": "two words"}], "document 1 .* must be one word"),
        ("winogrande", WORDS, "document 1 does not fit the task: it has another layout"),
    ],
)
def test_a_document_of_another_task_is_named(name, documents, reason):
    with pytest.raises(Unavailable, match=rf"^lm-eval cannot ask {name}: {reason}"):
        load_local_task(name, documents)


@pytest.mark.parametrize(
    "document",
    [
        {"query": "x", "choices": ["a", "b"], "gold": 2},
        {"query": "x", "choices": ["a", "b"], "gold": True},
        {"query": "x", "choices": ["a", ""], "gold": 0},
        {"context": "x", "continuation": ""},
        ["x"],
    ],
)
def test_a_damaged_document_is_named(tmp_path, document):
    file = write_task(tmp_path, "mine", [QUESTIONS[0], document])
    with pytest.raises(Unavailable, match=r"mine\.jsonl, line 2 is no document of a task"):
        read_documents(file)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{\n", r"mine\.jsonl, line 1 is not JSON"),
        (b"", r"mine\.jsonl has no documents"),
        (json.dumps(WORDS[0]).encode() + b"\n" + json.dumps(QUESTIONS[0]).encode(), "has documents of several layouts"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, fault):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(Unavailable, match=fault):
        read_documents(file)


def test_an_answer_that_cannot_be_asked(tokenizer):
    documents = [{"query": "q", "choices": ["a" * (POSITIONS + 1), "b"], "gold": 0}]
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"^lm-eval cannot ask mine: an answer has no token of its own, or more than"):
        score_tasks([load_local_task("mine", documents)], model, tokenizer, batch_size=1)


def test_data_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(Unavailable, match=r"^lm-eval cannot ask piqa: .* or from tasks/NAME\.jsonl under --data-dir"):
        load_hub_task("piqa", [])
