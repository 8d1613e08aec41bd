"""`compress report`: a page that says what compress.json and quality.json say, whole in itself, whatever they say."""

import html
import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from transformers import AutoModelForCausalLM

import tiny
from cli_runner import invoke, succeeds
from compress import stages
from compress.checkpoints.metadata import read_metadata
from compress.checkpoints.quality import read_quality
from compress.cli import app
from compress.inspection.drawing import Drawing, as_svg, axes, style
from compress.inspection.report import stage_in_words
from measures import MEASURED, NASTY, TUNING

WRITTEN = ("sliced", "packed", "thin", "turned")

VOID = {"meta", "br", "hr", "img", "link", "input"}
RATE = {"median": 150.0, "low": 140.0, "high": 160.0}
SPEED = {
    **{"engine": "transformers", "dense": "llama", "batch": 1, "prompt": 32, "new": 8, "rounds": 7, "dtype": "float32"},
    **{"machine": "cpu (x86_64)", "prefill": {}, "decode": {"dense": RATE, "compressed": RATE | {"median": 300.0}}},
}
TEXTS = {"dense": "llama", "tokens": 9, "texts": [{"prompt": "a <b", "dense": "\n\n& c", "compressed": ""}]}
EVERYTHING: dict[str, Any] = MEASURED | {"speed": [SPEED], "continuations": TEXTS}


class Page(HTMLParser):
    """Every tag has its end; what the page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words = list[tuple[str, dict[str, Any]]](), list[str](), list[str]()
        self.declared, self.source = "", text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_decl(self, decl: str) -> None:
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def commands(self) -> list[str]:
        found = re.findall(r'<pre class="command"><code>(.*?)</code></pre>', self.source, re.DOTALL)
        return [html.unescape(each) for each in found]


def page_of(folder: Path, *options: object) -> Page:
    succeeds("report", folder, *options)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def copied(root: Path, kind: str, to: Path, quality: Any = None, **changes: Any) -> Path:
    out = Path(shutil.copytree(root / kind, to))
    if quality is not None:
        (out / "quality.json").write_text(json.dumps(quality))
    facts = json.loads((out / "compress.json").read_text())
    (out / "compress.json").write_text(json.dumps(facts | changes))
    return out


@pytest.mark.parametrize("kind", ["sliced", "packed", "thin", "turned"])
def test_it_says_what_the_files_say(kind, root, tmp_path):
    out = copied(root, kind, tmp_path / kind)
    page, metadata = page_of(out), read_metadata(out)
    for said in (
        f"{metadata.size.parameters:,}",
        f"{metadata.size.bytes:,}",
        f"{metadata.dense_size.bytes:,}",
        metadata.base_model,
        *metadata.versions.values(),
        *(str(stage["stage"]) for stage in metadata.stages),
        *(f"{point.relative_error:.2%}" for point in metadata.points[2::2] if point.relative_error is not None),
        "how far the stream is" if kind == "sliced" else "--measure-error",
        "trust_remote_code=True" if kind in ("thin", "turned") else "vllm serve PATH",
        f"compress inspect {out}",
    ):
        assert said in page.text
    assert metadata.command in page.commands
    # Its own files are as whole as before, and the page is the same when it is written again.
    assert succeeds("inspect", out, "--json").json["verified"]
    assert page_of(out).source == page.source
    assert len(page.source) < 200_000


def test_it_is_whole_in_itself(root, tmp_path):
    page = page_of(copied(root, "packed", tmp_path / "packed", EVERYTHING))
    assert page.declared == "doctype html"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "img")
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes)
        for target in [attributes[name] for name in ("href", "xlink:href") if name in attributes]:
            assert target.startswith("data:image/png;base64,") if tag == "image" else target[1:] in ids
    assert "http" not in re.sub(r'xmlns(:xlink)?="http[^"]*"', "", page.source).replace("http-equiv", "")
    assert "url(" not in page.source.replace("url(#", "")
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in page.source
    assert 'name="viewport"' in page.source
    assert "prefers-color-scheme: dark" in page.source


def test_what_was_measured_is_in_it_with_its_commands(root, tmp_path):
    settings = {"perplexity": {"limit": 7, "dtype": "float32"}, "tasks": {"limit": None}}
    out = copied(root, "sliced", tmp_path / "a b", EVERYTHING | {"settings": settings})
    page = page_of(out)
    for said in (
        "12.35 ± 0.067",
        "0.5 nats a token",
        "piqa, acc 0.7 ± 0.1 9 documents from files",
        "HumanEval, pass@1",
        "decode, 1 x 8 150 ± 10 300 ± 10 2.00 x",
        "float32, cpu (x86_64).",
        "2.00 x as fast as llama, batch 1",
    ):
        assert said in page.text
    place, quoted = shlex.quote(str(out)), page.commands
    assert f"compress eval --model {place} --ppl wikitext2 --seq-len 2048 --limit 7 --save" in quoted
    assert f"compress eval --model {place} --kl x --ppl c4 --seq-len 64 --save" in quoted
    assert f"compress eval --model {place} --tasks piqa,boolq --save" in quoted
    assert f"compress eval --model {place} --humaneval --allow-code-execution --save" in quoted
    bench = f"compress bench {place} --against llama --batch-sizes 1 --prompt 32 --new 8 --rounds 7 --save"
    assert bench in quoted
    assert "yet" not in page.text
    assert '<pre class="prompt">a &lt;b</pre>' in page.source
    assert "<pre>\n\n\n&amp; c</pre>" in page.source  # of which HTML drops the first line end
    understood(quoted)


def understood(commands: list[str]) -> None:
    """That the command line has what they say."""
    group: Any = typer.main.get_command(app)
    for verb, *words in (shlex.split(command)[1:] for command in commands):
        group.commands[verb].make_context(verb, words)


def test_what_is_not_measured_is_said_with_what_would(root, tmp_path):
    out = copied(root, "sliced", tmp_path / "sliced")
    page = page_of(out)
    assert page.text.count("yet") == 3
    assert f"compress eval --model {out} --ppl wikitext2 --kl llama --save" in page.commands
    assert f"compress bench {out} --against llama --save" in page.commands
    assert f"compress report {out} --against llama --save" in page.commands
    understood(page.commands)


def nasty(root: Path, name: str, to: Path) -> Path:
    """A checkpoint in whose files `name` stands wherever a string is free, in a folder that is named by it, too."""
    recipe = {"method": name, "calibration": {"source": name, "samples": 8, "seq_len": 32}}
    tuning = TUNING | {"command": name, "teacher": name, "data": TUNING["data"] | {"source": name, "license": name}}
    quality = {
        "perplexity": [MEASURED["perplexity"][0] | {"dataset": name.replace("/", "")}],
        "divergence": [MEASURED["divergence"][0] | {"dense": name}],
        "tasks": {"scores": [MEASURED["tasks"]["scores"][0] | {"task": name}], "average": {name: 0.5}},
        "humaneval": MEASURED["humaneval"] | {"rates": {name: {"value": 0.5, "standard_error": None}}},
        "speed": [SPEED | {"dense": name, "machine": name, "dtype": name}],
        "continuations": TEXTS | {"dense": name, "texts": [{"prompt": name, "dense": name, "compressed": name}]},
        "settings": {"perplexity": {"limit": name, "dtype": name}},
    }
    facts = json.loads((root / "packed" / "compress.json").read_text())
    linears = [each | {"pattern": name} for each in facts["linears"]]
    return copied(
        root,
        "packed",
        to,
        quality,
        **{key: name for key in ("name", "base_model", "command")},
        not_for_vllm=name,
        recipe=recipe,
        tuning=tuning,
        linears=linears,
        origin={"license": "other", "license_name": name},
        versions={"compress": name, name: name},
        fingerprints={name: name},
        stages=[{"stage": name, name: name}, {"stage": "slim", "target": [name]}],
        alternatives=[{"name": name, "bits_per_weight": 4.0, "bytes": 10}],
    )


def test_names_are_text_and_nothing_else(root, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.inspection.report.chapters", lambda _seen: {})
    tame = page_of(nasty(root, "xyz", tmp_path / "tame"))
    for number, name in enumerate(NASTY[1:5]):
        folder = tmp_path / f'{number} <img src=x onerror=alert(1)> ]]> id=" &amp; url(#'
        page = page_of(nasty(root, name, folder))
        assert [(tag, sorted(each)) for tag, each in page.tags] == [(tag, sorted(each)) for tag, each in tame.tags]
        assert " ".join(name.split()) in page.text
        assert folder.name in page.text


@pytest.mark.parametrize("name", [NASTY[1], "]]></text></svg><script>alert(1)</script>", 'a" id="b" onload="c'])
def test_names_in_a_plot_are_text(name):
    def drawn(text: str) -> Page:
        with style():
            figure, (plot,) = axes(12, 5, title=text)
            plot.set_title(text.replace("\n", " "))
            plot.plot([1, 2], label=text.replace("\n", " "))
            plot.legend()
            return Page(as_svg(Drawing("x", figure)))

    page, tame = drawn(name), drawn("xyz")
    # How many ticks there are depends on how long the names are.
    assert {(tag, *sorted(each)) for tag, each in page.tags} == {(tag, *sorted(each)) for tag, each in tame.tags}
    assert " ".join(name.split()).replace('id="', 'id="x-') in page.text


def test_stages_are_told_by_their_files():
    told = stage_in_words({"stage": "slice", "width": 104, "slice_head": True, "ratio": None, "round_to": None})
    assert told["words"].startswith("Deleting the stream's least principal directions")
    assert told["settings"] == "width 104, slice_head"
    long = stage_in_words({"stage": "factorize", "ranks": {str(number): 4 for number in range(99)}})
    assert long["settings"] == "ranks of 99"
    assert stage_in_words({"stage": "later", "x": {"bits": 4}}) == {
        **{"name": "later", "words": "", "settings": "x (bits 4)"}
    }
    for name in stages.classes():
        assert 20 < len(stage_in_words({"stage": name})["words"]) < 250


def test_both_models_go_on_with_the_same_prompts(root, tmp_path):
    out = copied(root, "sliced", tmp_path / "sliced")
    (root / "llama" / "quality.json").write_text(json.dumps({"perplexity": MEASURED["perplexity"]}))
    (out / "quality.json").write_text(json.dumps({"perplexity": [MEASURED["perplexity"][0] | {"ppl": 99.0}]}))
    page = page_of(out, "--against", root / "llama", "--prompts", 2, "--save", "--device", "cpu")
    found = read_quality(out)
    assert found is not None
    assert found.perplexity[0].ppl == 99.0
    assert found.continuations is not None
    assert found.continuations.texts[0].prompt == "The capital of France is"
    assert len(found.continuations.texts) == 2
    tokenizer, model = tiny.tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(root / "llama")
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    new = model.generate(ids, do_sample=False, max_new_tokens=tiny.POSITIONS - ids.shape[1], pad_token_id=2)
    expected = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.continuations.texts[0].dense == expected
    assert found.continuations.texts[0].compressed != expected
    assert "12.35 ± 0.067" in page.text  # what was measured of the dense model
    assert "was not made from" not in page.text
    # The next report has them without the models.
    assert page_of(out).text.count("The capital of France is") == 1
    words = ["--against", root / "packed", "--device", "cpu", "--prompt", "if x", "--prompt", "<else>"]
    page = page_of(out, *words)  # of one's own
    assert '<pre class="prompt">&lt;else&gt;</pre>' in page.source
    assert "The capital" not in page.text
    assert "sliced was not made from packed as it is here." in page.text
    (fault,) = invoke("report", out, *words, "--prompt", "x" * 99).faults
    assert fault.startswith(f"The prompt {'x' * 40!r} has 99 tokens, of which ")


def test_without_matplotlib_it_has_no_plots_and_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = copied(root, "sliced", tmp_path / "sliced")
    ran = succeeds("report", out)
    page = Page((out / "report.html").read_text())
    assert "Without plots, which need matplotlib" in ran.out
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert "pip install 'compress-llm[plots]'" in page.text
    assert "stream error" in page.text


def test_what_cannot_be_reported_on(root, tmp_path):
    out = copied(root, "sliced", tmp_path / "sliced")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "taken").mkdir()
    for words, code, said in (
        ([root / "llama"], 2, "has no compress.json. Only checkpoints that compress has made are reported on."),
        ([tmp_path / "nowhere"], 2, "There is no folder"),
        ([out, "--out", tmp_path / "mine.html"], 2, "is there and is no report of compress"),
        ([out, "--out", tmp_path / "taken"], 2, "is a folder. Name a file in it"),
        ([out, "--out", tmp_path / "no" / "r.html"], 2, "There is no folder"),
        ([out, "--out", tmp_path / "mine.html" / "r.html"], 2, "There is no folder"),
        ([out, "--prompts", 3], 2, "are of --against"),
        ([out, "--save"], 2, "are of --against"),
        ([out, "--against", "lama"], 2, "lama"),
        ([out, "--against", "demo", "--prompts", 3, "--prompt", "x"], 2, "Use one of them"),
    ):
        ran = invoke("report", *words)
        assert (ran.code, len(ran.faults)) == (code, 1), ran.err
        assert said in ran.faults[0]
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert not (out / "report.html").exists()
    (out / "quality.json").write_text('{"perplexity": 3}')
    ran = invoke("report", out)
    assert (ran.code, len(ran.faults)) == (1, 1)
    assert "Delete it and measure again" in ran.faults[0]
    min(out.glob("*.safetensors")).unlink()
    assert invoke("report", out).code == 1
