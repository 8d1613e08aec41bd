"""The model card: front matter as the hub reads it, text that nothing breaks out of, measures, ways to load it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cli_runner import succeeds
from compress.checkpoints.card import model_card, read_origin
from compress.checkpoints.metadata import Metadata, read_metadata
from compress.checkpoints.quality import Quality
from measures import MEASURED, NASTY, TUNING

WRITTEN = ("sliced", "thin", "packed")

POINT = {"point": "embeddings", "width": 24, "dense_width": 32}


def metadata(**changes: Any) -> Metadata:
    """Of a small stock model."""
    usual = {
        "format": 3,
        "name": "tiny-anchored",
        "base_model": "owner/tiny",
        "command": "compress slice --model owner/tiny --ratio 0.25",
        "recipe": {"method": "anchored", "calibration": {"source": "wikitext2", "samples": 8, "seq_len": 32}},
        "architecture": "LlamaForCausalLM",
        "loads_without_our_code": True,
        "versions": {"compress": "0.1.0"},
        "fingerprints": {},
        "dense_size": {"parameters": 2000, "bytes": 4000},
        "size": {"parameters": 1500, "bytes": 3000},
        "held_out_divergence": 0.25,
        "points": [POINT],
        "parts": {},
    }
    return Metadata.model_validate(usual | changes)


def card(**changes: Any) -> str:
    return model_card(metadata(**changes))


def linears(*each: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"linear": f"l{number}", **one} for number, one in enumerate(each)]


def front_matter(text: str) -> Any:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def test_front_matter_is_what_the_hub_expects():
    origin = {"license": "llama2", "license_link": "https://x/LICENSE", "language": ["en", "de"]}
    found = front_matter(card(origin=origin))
    assert front_matter(card(quantized=True))["base_model_relation"] == "quantized"
    assert found == {
        "base_model": "owner/tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compress", "anchored"],
        **origin,
    }
    assert ModelCard(card(origin=origin)).data.to_dict() == found


@pytest.mark.parametrize("base", ["tiny", "./a/b/c", NASTY[0]])
def test_what_is_no_id_of_the_hub_is_not_called_one(base):
    found = front_matter(card(base_model=base))
    assert not found.keys() & {"base_model", "base_model_relation"}


def named(name: str, **changes: Any) -> str:
    """The card of a model that has every section, with `name` wherever a user or another file gives a string."""
    tuning = TUNING | {"command": name, "teacher": name, "data": TUNING["data"] | {"source": name, "license": name}}
    tuning["other_text"] = {"source": name, "windows": 1, "before": 1.0, "after": 2.0, "worse": True}
    everything: dict[str, Any] = {
        **{key: name for key in ("name", "base_model", "command", "not_for_vllm")},
        "recipe": {"method": name, "calibration": {"source": name, "samples": 8, "seq_len": 32}},
        "tuning": tuning | {"data": tuning["data"] | {"repository": None}},
        "origin": {"license": "other", "license_name": name},
        "versions": {"compress": name},
        "alternatives": [{"name": name, "bits_per_weight": 4.0, "bytes": 10}] * 2,
        "linears": linears({"bits": name, "pattern": name, "adapter_rank": 3}, {"rank": 4, "form": "pivot"}),
    }
    programs = MEASURED["humaneval"] | {"rates": {name: {"value": 0.5, "standard_error": None}}}
    quality = {"perplexity": [MEASURED["perplexity"][0] | {"dataset": name}], "humaneval": programs}
    return model_card(metadata(**everything | changes), Quality.model_validate(quality))


@pytest.mark.parametrize("form", [{}, {"loads_without_our_code": False, "export": "gguf", "form": "packed"}])
def test_nothing_breaks_out(form):
    """Rendered as markdown, a nasty name gives the same blocks and tags as a harmless one."""
    tame = named("x", **form)
    for nasty in NASTY:
        text = named(nasty, **form)
        assert blocks(text) == blocks(tame)
        assert inner(text) == inner(tame)
        assert front_matter(text) == front_matter(tame) | {"tags": ["compress", nasty], "license_name": nasty}
        fences = [token for token in parsed(card(command=nasty)) if token.type == "fence" and not token.info]
        assert fences[-1].content == nasty + "\n"  # the command is whole in its block


def parsed(text: str) -> list[Any]:
    body = text.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)


def blocks(text: str) -> list[str]:
    return [token.type for token in parsed(text)]


def inner(text: str) -> list[list[str]]:
    """What is in each line of text beside text."""
    return [
        [child.type for child in token.children or [] if child.type not in ("text", "text_special", "softbreak")]
        for token in parsed(text)
    ]


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        (
            {},
            ["vllm serve PATH\n", 'from_pretrained("PATH")', "(width of the residual stream): 24 instead of 32."],
            ["import compress", "llama.cpp"],
        ),
        (
            {"architecture": "CompressForCausalLM", "loads_without_our_code": False},
            [
                "import compress  # registers",
                "trust_remote_code=True",
                "vllm serve PATH --trust-remote-code\n",
            ],
            ["llama"],
        ),
        (
            {"architecture": "CompressForCausalLM", "loads_without_our_code": False, "not_for_vllm": "its reason"},
            ["vLLM cannot serve it: its reason."],
            ["vllm serve"],
        ),
        (
            {"architecture": "DeciLMForCausalLM", "loads_without_our_code": False},
            ["vllm serve PATH --trust-remote-code\n"],
            ["cannot"],
        ),
        ({"architecture": "FalconForCausalLM"}, ["vLLM was not tried with FalconForCausalLM."], ["vllm serve"]),
        ({"export": "gguf"}, ["llama-cli -m PATH/*.gguf"], []),
        (
            {"adapter": {"r": 12, "rank_pattern": {}}, "quantized": True, "form": "packed"},
            ["--enable-lora --lora-modules corrected=PATH/adapter --max-lora-rank 16\n", "compress.load"],
            [],
        ),
        (
            {"adapter": {"r": 12, "rank_pattern": {}}, "architecture": "GPTNeoXForCausalLM"},
            ["vLLM was not tried with GPTNeoXForCausalLM and an adapter."],
            ["vllm serve"],
        ),
        (
            {"linears": linears({"bits": 4, "pattern": "2:4", "adapter_rank": 3}), "form": "packed"},
            ["1 linear layers have 4-bit weights, 2:4 sparsity, a low-rank adapter that corrects the error."],
            ["dense weights"],
        ),
        (
            {"linears": linears({"bits": "mxfp4"}), "form": "packed", "quantized": True},
            ["have mxfp4 weights", "vllm serve PATH --dtype bfloat16\n", "Blackwell GPUs may round inputs"],
            [],
        ),
        (
            {"linears": linears({"bits": "nvfp4"}), "form": "packed", "quantized": True},
            ["have nvfp4 weights", "With vLLM, where it has kernels for such weights", "```\nvllm serve PATH\n"],
            ["Blackwell"],
        ),
        ({"origin": {"license": "mit"}}, ["The license is the base model's: `mit`."], ["names none"]),
        (
            {"tuning": TUNING},
            [
                "compress slice --model owner/tiny --ratio 0.25\ncompress finetune x\n",
                "The low-rank factors were trained to match the next-token distribution of `tiny` on 1,000 sequences\n"
                "of 256 tokens of `alpaca`.",
                "Of 1,200 steps, the result of step 1,100 was kept",
                "Perplexity on those sequences: 20.09 before, 7.39 after.",
                "datasets:\n- owner/alpaca\n",
            ],
            ["not trained on", "The license of"],
        ),
        (
            {
                "tuning": TUNING
                | {
                    "other_text": {"source": "c4", "windows": 9, "before": 1.0, "after": 1.1, "worse": True},
                    "data": TUNING["data"] | {"license": "cc-by-nc-4.0"},
                }
            },
            [
                "Perplexity on `c4`, which was not trained on: +10.5%.\n**This is a loss in general quality",
                "The license of `alpaca` is cc-by-nc-4.0; it",
            ],
            [],
        ),
    ],
)
def test_it_says_what_works_for_this_form(changes, said, unsaid):
    text = card(**changes)
    assert [phrase for phrase in said if phrase not in text] == []
    assert [phrase for phrase in unsaid if phrase in text] == []


def write_card(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def test_license_and_language_come_from_the_input(tmp_path):
    text = "---\nlicense: other\nlicense_name: l\nlicense_link: L.md\nlanguage:\n- en\n- code\ntags: [x]\n---\n# x\n"
    assert read_origin(write_card(tmp_path, text)) == {
        "license": "other",
        "license_name": "l",
        "license_link": "L.md",
        "language": ["en", "code"],
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter\n---\nlicense: mit\n---\n",
        "---\nlicense: [mit]\nlanguage: {en: 1}\n---\n",
        '---\nlicense: "a\\nb"\n---\n',
        "---\n: : :\n- [\n---\n",
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\nlicense: " + "m" * 300 + "\n---\n",
        "---\nlicense: " + "[" * 5000 + "\n---\n",
    ],
)
def test_a_card_that_says_nothing_of_use(text, tmp_path):
    assert read_origin(write_card(tmp_path, text)) == {}


@pytest.mark.parametrize("kind", ["thin", "packed"])
def test_written_again_it_is_the_same(root, kind):
    before = (root / kind / "README.md").read_bytes()
    succeeds("inspect", root / kind, "--card", "--fast")
    assert (root / kind / "README.md").read_bytes() == before
    metadata = read_metadata(root / kind)
    assert model_card(metadata).encode() == before
    assert metadata.to_dict() == json.loads((root / kind / "compress.json").read_text())


def test_what_was_measured_is_in_it(root, tmp_path):
    shutil.copytree(root / "sliced", tmp_path / "sliced")
    (tmp_path / "sliced" / "quality.json").write_text(json.dumps(MEASURED))
    succeeds("inspect", tmp_path / "sliced", "--card")
    text = (tmp_path / "sliced" / "README.md").read_text()
    for row in (
        "| perplexity on wikitext2, windows of 2048 | 12.35 ± 0.067 |",
        "| divergence from dense on c4, windows of 64 | 0.5 nats a token |",
        "| same likeliest token as dense on c4, windows of 64 | 75 % |",
        "| piqa, acc | 0.7 ± 0.1 |",
        "| boolq, acc | 0.5 |",
        "| average of the tasks, acc | 0.6 |",
        "| HumanEval, pass@1 | 0.25 ± 0.05 |",
    ):
        assert f"\n{row}\n" in text
    assert "acc\\_norm" not in text
    # All else is as it was, and the checkpoint as whole as before.
    before = (root / "sliced" / "README.md").read_text()
    assert text.replace(text[text.index("\n## Evaluation") : text.index("\n## Usage")], "") == before
    assert succeeds("inspect", tmp_path / "sliced", "--json").json["verified"]


def test_it_shows_the_plots_that_lie_beside_it(root, tmp_path):
    out = Path(shutil.copytree(root / "sliced", tmp_path / "sliced"))
    succeeds("inspect", out, "--fast", "--card", "--plot", out / "plots")
    (out / "plots" / "x](http:y) .png").touch()
    succeeds("inspect", out, "--card")
    text = (out / "README.md").read_text()
    assert re.findall(r"!\[.*\n", text) == [
        f"![{name}](plots/{name}.png)\n" for name in ("energy", "errors", "sizes", "spectra")
    ]
    shutil.rmtree(out / "plots")
    succeeds("inspect", out, "--card", "--fast")
    assert (out / "README.md").read_bytes() == (root / "sliced" / "README.md").read_bytes()
