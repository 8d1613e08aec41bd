"""Accuracy on tasks: against a loop over tokens, and against lm-eval itself where it is installed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.datasets.tasks import load_documents, names
from compress.errors import NumericalError, Unavailable, UsageError
from compress.evaluation import harness
from compress.evaluation._scores import FORMATS, Metric, TaskScore, averages, mean, preferred_accuracy
from compress.evaluation._scoring import Request, context_length, encode_pair, likelihood, log_likelihoods
from compress.evaluation.tasks import requests_of, score_task
from tiny import FAMILIES, POSITIONS, tiny_config, tiny_model, tiny_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
on_data = pytest.mark.skipif(not (DATA / "tasks").is_dir(), reason="the tasks' files are not here")

QUESTIONS = [
    {"query": "Question: why?\n", "choices": ["so", "because it is", "é"], "gold": 1},
    {"query": "Question: 1 + 1 \n", "choices": ["2", "three"], "gold": 0},
    {
        "query": "Question: a long one, of which the model cannot read the start, no\n",
        "choices": ["no", "yes"],
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
    "piqa": QUESTIONS,
    "hellaswag": QUESTIONS,
    "boolq": PASSAGES,
    "winogrande": PRONOUNS,
    "lambada_openai": WORDS,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def with_bos() -> Any:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def words_with_spaces() -> Any:
    """Whose tokens begin with a space: where context and continuation are cut matters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb", "be"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("Ġ", "b"), ("b", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


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


# Likelihoods.


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_loop_over_tokens_agrees(model, tokenizer, batch_size):
    requests = [Request("ab", " c"), Request("ab", " d"), Request("a longer one", " with an end"), Request("x", "yz")]
    found = log_likelihoods(model, tokenizer, requests, max_length=POSITIONS, batch_size=batch_size)
    for request, (value, greedy) in zip(requests, found, strict=True):
        tokens = tokenizer.encode("".join(request))
        expected = slow_likelihood(model, tokens, len(tokenizer.encode(request.context)))
        assert value == pytest.approx(expected[0], rel=1e-12)
        assert greedy == expected[1]


def test_greedy_is_said_of_the_likeliest_tokens_alone():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    assert likelihood(logits, [1, 0]) == (pytest.approx(float(log_p[0, 1] + log_p[1, 0]), rel=1e-12), True)
    assert not likelihood(logits, [1, 2]).greedy
    assert not likelihood(logits, [2, 0]).greedy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_is_taken_in_float32(dtype):
    logits = torch.randn(3, 50).to(dtype)
    expected = logits.double().log_softmax(-1)[torch.arange(3), torch.tensor([4, 5, 6])].sum()
    assert likelihood(logits, [4, 5, 6]).value == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_with_padding_and_without(model_type, tokenizer):
    model = tiny_model(model_type, num_hidden_layers=1)
    requests = [Request("ab", " c"), Request("a longer one", " with an end"), Request("x", "yz")]
    together = log_likelihoods(model, tokenizer, requests, max_length=POSITIONS, batch_size=3)
    alone = [
        log_likelihoods(model, tokenizer, [each], max_length=POSITIONS, batch_size=1)[0].value for each in requests
    ]
    assert [each.value for each in together] == pytest.approx(alone, rel=1e-9)


def test_answers_to_one_question_share_a_row(model, tokenizer):
    read = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, options: read.append(options["input_ids"].shape[0]), with_kwargs=True
    )
    requests = [Request("is it?", " y"), Request("is it?", " n"), Request("is it?", " yes")]
    log_likelihoods(model, tokenizer, requests, max_length=POSITIONS, batch_size=8)
    handle.remove()
    # " y" and " n" are two tokens, read from one; they share their first.
    assert read == [2]


def test_the_longest_come_first(model, tokenizer):
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    log_likelihoods(model, tokenizer, [Request("a" * n, "b") for n in (3, 9, 5)], max_length=POSITIONS, batch_size=1)
    handle.remove()
    assert lengths == [9, 5, 3]


# Where context and continuation are cut.


def pair(tokenizer: Any, context: str, continuation: str, max_length: int = POSITIONS) -> tuple[str, str]:
    """The inputs and targets as text; targets begin within the inputs but for the first token."""
    encoded = encode_pair(tokenizer, Request(context, continuation), max_length)
    return tokenizer.decode(encoded.inputs), tokenizer.decode(encoded.targets)


def test_spaces_go_to_the_continuation():
    tokenizer = words_with_spaces()
    assert pair(tokenizer, "a ", "be") == pair(tokenizer, "a", " be") == ("a b", " be")
    assert encode_pair(tokenizer, Request("a ", "be"), 9).targets == tuple(tokenizer.encode(" be"))


def test_the_texts_are_tokenized_as_one():
    """`be` is one token, which takes the place of the context's last: the continuation is what comes after."""
    tokenizer = words_with_spaces()
    assert pair(tokenizer, "xb", "exy") == ("xbx", "xy")
    with pytest.raises(UsageError, match="'e' has no token of its own"):
        encode_pair(tokenizer, Request("xb", "e"), POSITIONS)


def test_what_is_too_long_loses_its_start(tokenizer):
    assert pair(tokenizer, "abcdef", "gh", 3) == ("efg", "gh")
    assert pair(tokenizer, "abcdef", "ghi", 3) == ("fgh", "ghi")
    with pytest.raises(UsageError, match=r"'ghij'\.\.\. has 4 tokens, and the model reads 3"):
        encode_pair(tokenizer, Request("abcdef", "ghij"), 3)


def test_without_a_context_the_first_token_is_bos(tokenizer):
    assert encode_pair(tokenizer, Request("", "ab"), 9).inputs[0] == tokenizer.bos_token_id
    assert len(encode_pair(tokenizer, Request("", "ab"), 9).targets) == 2
    assert len(encode_pair(tokenizer, Request("", "<s>ab"), 9).targets) == 2
    ending = tiny_tokenizer()
    ending.bos_token = None
    assert encode_pair(ending, Request("", "ab"), 9).inputs[0] == ending.eos_token_id


def test_a_tokenizers_bos_is_added_once():
    tokenizer = with_bos()
    bos = tokenizer.bos_token_id
    assert encode_pair(tokenizer, Request("ab", "c"), 9).inputs.count(bos) == 1
    assert encode_pair(tokenizer, Request("<s>ab", "c"), 9).inputs.count(bos) == 1


def test_the_context_of_a_model(tokenizer):
    assert context_length(tiny_config("llama"), tokenizer) == POSITIONS
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert context_length(config, tokenizer) == 2048
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    assert context_length(config, tokenizer) == 77


def test_a_likelihood_that_is_no_number(tokenizer):
    model = tiny_model("llama", num_hidden_layers=1)
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError, match="likelihood of ' c' is no number"):
        log_likelihoods(model, tokenizer, [Request("ab", " c")], max_length=POSITIONS, batch_size=1)


# Tasks.


def test_what_is_asked_is_what_lm_eval_asks():
    assert requests_of("piqa", QUESTIONS[0])[1] == ("Question: why?\nAnswer:", " because it is")
    assert requests_of("arc_easy", {"query": "Question: x?", "choices": ["a", "b"], "gold": 0})[0] == (
        "Question: x?\nAnswer:",
        " a",
    )
    assert requests_of("boolq", PASSAGES[0])[0] == ("x is y.\nQuestion: is x y?\nAnswer:", " no")
    assert requests_of("hellaswag", QUESTIONS[0])[0] == ("Question: why?\n", " so")
    assert requests_of("winogrande", PRONOUNS[0]) == [
        ("Ann saw Bo because Ann", " looked."),
        ("Ann saw Bo because Bo", " looked."),
    ]
    assert requests_of("lambada_openai", WORDS[0]) == [("one two three", " four")]
    assert requests_of("my own", QUESTIONS[0])[0] == ("Question: why?\n", " so")


def slow_accuracies(task: str, model: Any, tokenizer: Any) -> dict[str, float]:
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for document in TASKS[task]:
        scores = []
        for context, continuation in requests_of(task, document):
            tokens = tokenizer.encode(context.rstrip())
            whole = tokenizer.encode(context + continuation)
            start = max(0, len(whole) - POSITIONS - 1)
            scores.append(slow_likelihood(model, whole[start:], len(tokens) - start))
        if "gold" not in document:
            right["acc"].append(scores[0][1])
            continue
        values = [value for value, _ in scores]
        right["acc"].append(values.index(max(values)) == document["gold"])
        if "choices" in document:
            values = [value / len(choice) for value, choice in zip(values, document["choices"], strict=True)]
            right["acc_norm"].append(values.index(max(values)) == document["gold"])
    kept_names = ["acc", *(["acc_norm"] if FORMATS[task].normalised else [])]
    return {name: sum(right[name]) / len(right[name]) for name in kept_names}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_accuracies_against_a_loop(task, seed, tokenizer):
    model = tiny_model("llama", seed=seed)
    done: list[int] = []
    score = score_task(task, TASKS[task], model, tokenizer, batch_size=3, on_batch=done.append)
    assert {name: each.value for name, each in score.metrics.items()} == slow_accuracies(task, model, tokenizer)
    assert (score.task, score.source, score.documents) == (task, "files", len(TASKS[task]))
    assert sum(done) == sum(len(requests_of(task, document)) for document in TASKS[task])


def test_the_error_of_a_mean():
    assert mean([1.0, 0.0, 1.0, 1.0]) == Metric(0.75, 0.25)
    assert mean([1.0]) == Metric(1.0, None)


def test_the_averages_of_the_papers():
    """SLiM's of acc; SliceGPT's of acc_norm, with acc for WinoGrande, which has no other."""
    scores = [
        TaskScore("a", "files", 9, {"acc": Metric(0.5, None), "acc_norm": Metric(0.7, None)}),
        TaskScore("b", "files", 9, {"acc": Metric(0.3, None)}),
    ]
    assert averages(scores) == {"acc": pytest.approx(0.4), "acc_norm": pytest.approx(0.5)}
    assert [preferred_accuracy(score) for score in scores] == ["acc_norm", "acc"]
    without = TaskScore("c", "lm-eval", 9, {"word_perplexity": Metric(9.0, None)})
    assert averages([*scores, without]) == {"acc": None, "acc_norm": None}
    assert averages([]) == {"acc": None, "acc_norm": None}


def test_an_answer_too_long_names_the_task(model, tokenizer):
    documents = [{"query": "q", "choices": ["a" * (POSITIONS + 1), "b"], "gold": 0}]
    with pytest.raises(UsageError, match=r"^The task 'mine' cannot be asked: The answer ' aaa"):
        score_task("mine", documents, model, tokenizer, batch_size=1)


# Files.


def write_task(folder: Path, name: str, documents: list[Any]) -> Path:
    file = folder / "tasks" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), encoding="utf-8"
    )
    return file


def test_files_are_read(tmp_path):
    for name, documents in TASKS.items():
        write_task(tmp_path, name, documents)
        assert load_documents(name, tmp_path) == documents
    assert names(tmp_path) == sorted(TASKS)
    assert names(None) == []
    assert load_documents("piqa", tmp_path, limit=2) == QUESTIONS[:2]
    line_separator = [{"context": "a\u2028b", "continuation": "c"}]
    write_task(tmp_path, "separator", line_separator)
    assert load_documents("separator", tmp_path) == line_separator


@pytest.mark.parametrize(
    "document",
    [
        {"query": "x", "choices": ["a", "b"]},
        {"query": "x", "choices": ["a", "b"], "gold": 2},
        {"query": "x", "choices": ["a", "b"], "gold": -1},
        {"query": "x", "choices": ["a"], "gold": 0},
        {"query": "x", "choices": ["a", 1], "gold": 0},
        {"query": 1, "choices": ["a", "b"], "gold": 0},
        {"context": "x"},
        ["x"],
    ],
)
def test_a_damaged_document_is_named(tmp_path, document):
    write_task(tmp_path, "mine", [QUESTIONS[0], document])
    with pytest.raises(Unavailable, match=r"mine\.jsonl, line 2 is no document of a task"):
        load_documents("mine", tmp_path)


def test_damaged_files_are_named(tmp_path):
    write_task(tmp_path, "mine", []).write_text("{\n")
    with pytest.raises(Unavailable, match=r"mine\.jsonl, line 1 is not JSON"):
        load_documents("mine", tmp_path)
    write_task(tmp_path, "mine", [])
    with pytest.raises(Unavailable, match=r"mine\.jsonl has no documents"):
        load_documents("mine", tmp_path)
    write_task(tmp_path, "mine", []).write_bytes(b"\xff\n")
    with pytest.raises(Unavailable, match=r"mine\.jsonl cannot be read"):
        load_documents("mine", tmp_path)


@on_data
def test_the_published_files():
    """Their sizes are those of the splits that papers report; every document can be asked."""
    sizes = {"piqa": 1838, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270}
    for name, size in (sizes | {"lambada_openai": 5153}).items():
        documents = load_documents(name, DATA)
        assert len(documents) == size
        for document in documents:
            for context, continuation in requests_of(name, document):
                assert context.strip()
                assert continuation.strip()
    assert requests_of("boolq", load_documents("boolq", DATA)[0])[0].context.endswith("produces?\nAnswer:")
    assert requests_of("piqa", load_documents("piqa", DATA)[0])[0].context.endswith("occupants?\nAnswer:")


# lm-eval.


def test_a_task_that_nobody_has(monkeypatch):
    monkeypatch.setattr(harness, "is_installed", lambda: False)
    with pytest.raises(UsageError, match=r"^Unknown task 'piqqa'\. Did you mean 'piqa'\? Available: arc_challenge, .*"):
        harness.check_name("piqqa", ["my_own"])
    with pytest.raises(UsageError, match=r"Did you mean 'my_own'\?.* my_own"):
        harness.check_name("my_onw", ["my_own"])
    with pytest.raises(Unavailable, match=r"^The task 'hellaswag' is not on this machine\. Put tasks/hellaswag\.jsonl"):
        harness.check_name("hellaswag", [])


def test_what_is_read_of_lm_evals_result():
    found = {
        "results": {
            "wiki": {"alias": "wiki", "word_perplexity,none": 9.5, "word_perplexity_stderr,none": "N/A"},
            "gsm": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,flexible": 0.6},
            "part": {"acc,none": 0.1},
        },
        "groups": {"all": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "all"}},
        "group_subtasks": {"all": ["part", "other"]},
        "n-samples": {"wiki": {"original": 62, "effective": 3}, "part": {"effective": 4}, "other": {"effective": 5}},
    }
    wiki = harness.read_score("wiki", "lm-eval 0", found)
    assert wiki == TaskScore("wiki", "lm-eval 0", 3, {"word_perplexity": Metric(9.5, None)})
    assert harness.read_score("gsm", "s", found).metrics == {
        "exact_match (strict)": Metric(0.5, 0.1),
        "exact_match (flexible)": Metric(0.6, None),
    }
    assert harness.read_score("all", "s", found) == TaskScore("all", "s", 9, {"acc": Metric(0.25, 0.01)})


def lm_eval_task(name: str, folder: Path, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """A task of lm-eval's on the same documents, told in its own words."""
    asks: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    asks["dataset_kwargs"] = {"data_files": {"test": str(write_task(folder, name, documents))}}
    accuracies = ["acc", *(["acc_norm"] if FORMATS[name].normalised else [])]
    asks["metric_list"] = [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in accuracies]
    if name == "winogrande":
        asks |= {
            "doc_to_text": lambda document: document["gold"],
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        }
    elif name == "lambada_openai":
        asks |= {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' '+continuation}}"}
    else:
        asks |= {
            "doc_to_text": lambda document: requests_of(name, document)[0].context,
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
    return {"task": f"our_{name}", **asks}


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    found = pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make_tokenizer", [tiny_tokenizer, with_bos, words_with_spaces])
def test_likelihoods_are_lm_evals(lm_eval, make_tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer()
    model = tiny_model("llama", vocab_size=300, dtype=torch.float32)
    requests = [
        request for task, documents in TASKS.items() for each in documents for request in requests_of(task, each)
    ]
    requests += [Request("", "be"), Request("a ", "be "), Request("<s>a", "b"), Request("x " * 60, "be")]
    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    instances = [Instance("loglikelihood", {}, tuple(each), 0) for each in requests]
    theirs = runner.loglikelihood(instances, disable_tqdm=True)
    ours = log_likelihoods(model, tokenizer, requests, max_length=POSITIONS, batch_size=3)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def check_against_lm_eval(lm_eval: Any, task: str, documents: list[dict[str, Any]], model: Any, folder: Path) -> None:
    """All that lm-eval says of a task, from its own tokens, batches and metrics."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = tiny_tokenizer()
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[lm_eval_task(task, folder, documents)],
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
        bootstrap_iters=10,
    )
    theirs = harness.read_score(f"our_{task}", "files", found)
    ours = score_task(task, documents, model, tokenizer, batch_size=8)
    assert ours.documents == theirs.documents
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, metric in ours.metrics.items():
        assert metric.value == theirs.metrics[name].value
        assert metric.error == pytest.approx(theirs.metrics[name].error, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", TASKS)
def test_accuracies_are_lm_evals(lm_eval, tmp_path, task):
    check_against_lm_eval(lm_eval, task, TASKS[task], tiny_model("llama", dtype=torch.float32), tmp_path)


@on_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["piqa", "arc_easy", "arc_challenge", "winogrande", "lambada_openai", "boolq"])
def test_accuracies_are_lm_evals_on_the_published_files(lm_eval, tmp_path, task):
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=1024)
    check_against_lm_eval(lm_eval, task, load_documents(task, DATA, limit=25), model, tmp_path)


# What the hub gives for lm-eval's tasks, and the same documents as files have them.
HUB: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "piqa": (
        "validation",
        [{"goal": "wash it ", "sol1": "with soap", "sol2": "with sand, twice", "label": 1}],
        [{"query": "Question: wash it \n", "choices": ["with soap", "with sand, twice"], "gold": 1}],
    ),
    "arc_easy": (
        "test",
        [{"question": "Why?", "choices": {"text": ["so", "no", "é"], "label": ["A", "B", "C"]}, "answerKey": "C"}],
        [{"query": "Question: Why?", "choices": ["so", "no", "é"], "gold": 2}],
    ),
    "boolq": (
        "validation",
        [{"passage": "x is y.", "question": "is x y", "label": 1}],
        [{"query": "Passage: x is y.\nQuestion: is x y?", "choices": ["no", "yes"], "gold": 1}],
    ),
    "winogrande": (
        "validation",
        [{"sentence": "Ann saw Bo, so _ looked.", "option1": "Ann", "option2": "Bo", "answer": "2"}],
        [{"context_options": ["Ann saw Bo, so Ann", "Ann saw Bo, so Bo"], "continuation": "looked.", "gold": 1}],
    ),
    "lambada_openai": (
        "test",
        [{"text": "one two three four"}],
        [{"context": "one two three", "continuation": "four"}],
    ),
    "hellaswag": (
        "validation",
        [{"activity_label": "Go", "ctx_a": "He", "ctx_b": "then", "endings": ["runs [x]", "sits"], "label": "1"}],
        [{"query": "Go: He Then", "choices": ["runs ", "sits"], "gold": 1}],
    ),
}


PLACES = {
    "baber/piqa": "piqa",
    "allenai/ai2_arc": "arc_easy",
    "aps/super_glue": "boolq",
    "allenai/winogrande": "winogrande",
    "EleutherAI/lambada_openai": "lambada_openai",
    "Rowan/hellaswag": "hellaswag",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_hubs_tasks_are_asked_as_the_files(lm_eval, monkeypatch):
    """The same questions to the letter, from lm-eval's own tasks and from ours: equal in all that is measured."""
    import datasets

    asked = []

    def load_dataset(path: str, **_: Any) -> Any:
        split, rows, _files = HUB[PLACES[path]]
        return datasets.DatasetDict({each: datasets.Dataset.from_list(rows) for each in {"train", split}})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
    model.register_forward_pre_hook(lambda _module, given: asked.append(given[0]) if given else None)
    harness.fetch([*HUB])
    scores = harness.score_tasks([*HUB], model, tokenizer, batch_size=1, limit=None)
    theirs = {tuple(row) for ids in asked for row in ids.tolist()}
    for score in scores:
        documents = HUB[score.task][2]
        ours = score_task(score.task, documents, model, tokenizer, batch_size=1)
        assert score.source.startswith("lm-eval 0.")
        assert score.documents == ours.documents == 1
        for name, metric in ours.metrics.items():
            assert score.metrics[name].value == metric.value, (score.task, name)
        for document in documents:
            for request in requests_of(score.task, document):
                assert encode_pair(tokenizer, request, POSITIONS).inputs in theirs, (score.task, request)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_lm_evals_whose_data_are_out_of_reach(lm_eval, monkeypatch):
    harness.check_name("piqa", [])
    harness.check_name("mmlu", [])
    with pytest.raises(UsageError, match=r"^Unknown task 'mmluu'\. Did you mean"):
        harness.check_name("mmluu", [])
    with pytest.raises(Unavailable, match=r"^lm-eval cannot ask piqa: .* tasks/NAME\.jsonl under --data-dir"):
        harness.fetch(["piqa"])
