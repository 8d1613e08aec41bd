"""Which engines run which kinds of checkpoints, and whether they compute the same; the table of docs/engines.md.

    scripts/serve_check --write docs/engines.md               # makes vLLM's environment, then runs this
    python benchmarks/engines.py --vllm VENV/bin/python --write docs/engines.md

Every kind is made of a small random model by a command of ours. Transformers' logits are the reference: what it writes
greedily after three prompts and the log-probabilities of prompts and text. vLLM has to write the same tokens, through
its Python API and where `Kind` says so through its OpenAI server, with the options of the model card. llama.cpp reads
the GGUF file of the same weights and is given the same text. The program ends with an error where an engine that runs a
kind computes something else, or where it runs what the model card says that it does not.
"""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import marked

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import tiny
from cli_runner import invoke
from compress import pipeline
from compress.checkpoints.gguf import write_gguf
from compress.errors import CompressError
from compress.evaluation.llamacpp import LlamaCpp

CONTEXT, NEW = 64, 16  # tokens
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",  # threads that wait let others compute
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
WIDE: dict[str, Any] = {  # heads of 64, a size that vLLM's attention has on CPUs
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 264,
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None, "head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "phi3": {},
    "gemma": {"head_dim": 64},
    "phi": {"intermediate_size": 512},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh"},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256, "intermediate_size": None},
    "gpt_neox": {},
    "gpt_bigcode": {"n_inner": 512, "intermediate_size": None},
}
WRONG = "differs:"
EXACT = 1e-3  # nats, of float32 arithmetic in another order
HALF = 1e-2  # of llama.cpp's GELU, which it looks up in float16
GELU = ("gemma", "starcoder2")


@dataclass(frozen=True)
class Kind:
    """One row.

    words: of the command. dtype: that vLLM computes in. served: by vLLM's OpenAI server too. gguf: written
    for llama.cpp as well. rounds: a model with rounded inputs, where other code rounds other numbers up: what counts is
    the mean over the prompts, and that it is no more than what rounding them does.
    """

    name: str
    family: str
    words: str
    dtype: str = "float32"
    served: bool = False
    gguf: bool = False
    rounds: bool = False


SLICE = "slice --ratio 0.25 --round-to 64"
KINDS = [
    *(
        Kind(f"{family}, sliced", family, SLICE, gguf=family != "phi", served=family in ("llama", "qwen3"))
        for family in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "phi", "starcoder2")
    ),
    *(
        Kind(f"{family}, low rank multiplied out", family, "lord --rank-frac 0.5 --materialize")
        for family in ("opt", "gpt_neox", "gpt_bigcode")
    ),
    Kind("4-bit integers", "llama", "quantize --bits 4 --group 64"),
    Kind("4-bit integers, asymmetric", "llama", "quantize --bits 4 --group 64 --asymmetric"),
    Kind("3-bit integers", "llama", "quantize --bits 3 --group 64"),
    Kind("8-bit integers", "llama", "quantize --bits 8 --group 64"),
    Kind("4 bits, the head in 8", "llama", "quantize --bits 4 --group 64 --head-bits 8"),
    Kind("4 bits, head and embeddings too", "llama", "quantize --bits 4 --group 64 --head-bits 4 --embedding-bits 4"),
    Kind("4 bits, a tied table too", "qwen2", "quantize --bits 4 --group 64 --embedding-bits 4"),
    Kind("integers, a type for each linear", "llama", "auto --target-size 2MB --for vllm"),
    Kind("8-bit integers, inputs too", "llama", "quantize --bits 8 --group channel --inputs int8", rounds=True),
    Kind("8-bit floats", "llama", "quantize --bits fp8 --group channel"),
    Kind("8-bit floats, inputs too", "llama", "quantize --bits fp8 --group channel --inputs fp8", rounds=True),
    Kind("8-bit floats by blocks", "llama", "quantize --bits fp8 --group 128x128"),
    Kind(
        "8-bit floats by blocks, inputs too", "llama", "quantize --bits fp8 --group 128x128 --inputs fp8", rounds=True
    ),
    Kind("NVFP4", "llama", "quantize --bits nvfp4", dtype="bfloat16"),
    Kind("MXFP4", "llama", "quantize --bits mxfp4", dtype="bfloat16"),
    Kind("4 bits and an adapter", "llama", "slim --bits 4 --group 64 --sparsity none --adapter-rank 0.1"),
    Kind("an adapter on dense weights", "llama", "slim --sparsity 2:4 --bits none --adapter-rank 0.1", served=True),
    *(
        Kind(f"an adapter on dense weights, {family}", family, "slim --sparsity 2:4 --bits none --adapter-rank 0.1")
        for family in ("mistral", "qwen2", "qwen3")
    ),
    Kind("4 bits on a narrower stream", "llama", "run slice-then-slim --set slim.adapt=null"),
    Kind("a width of each MLP", "llama", "slice --keep-params 0.7 --allocation free", gguf=True, served=True),
    Kind("low-rank factors", "llama", "lord --rank-frac 0.5 --form factors", served=True),
    Kind("low-rank factors, pivots", "llama", "lord --rank-frac 0.5 --form pivot"),
    *(
        Kind(f"low-rank factors, {family}", family, "lord --rank-frac 0.5 --form factors")
        for family in ("mistral", "qwen2", "qwen3")
    ),
    Kind("a basis behind every branch", "llama", "slice --method slicegpt --ratio 0.25"),
    Kind("compact", "llama", "slim --bits 4 --sparsity 2:4 --adapter-rank 0.1 --compact"),
    Kind("GGUF in block types", "llama", "quantize --type Q4_K_M", rounds=True),
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, tiny.VOCAB_SIZE, (length,), generator=generator).tolist() for length in (12, 20, 27)]


def by_transformers(folder: Path) -> dict[str, Any]:
    """The reference: greedy text and log-probabilities, computed in float32; `unrounded`: of inputs as they are."""
    facts, files = json.loads((folder / "compress.json").read_text(encoding="utf-8")), list(folder.glob("*.gguf"))
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    if not (folder / "config.json").exists():
        options["gguf_file"] = files[0].name
    if facts["quantized"] and facts["unpacks_while_loading"]:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    found: dict[str, Any] = {"ids": [], "log_probs": [], "unrounded": []}
    schemes = [each for each in (getattr(part, "quantization_scheme", None) for part in model.modules()) if each]
    with torch.no_grad():
        model(torch.tensor([[0, 1]]))  # unpacks what is packed; PEFT looks for the weights
        if (folder / "adapter").exists():
            model = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
        for prompt in prompts():
            ids = list(prompt)
            while len(ids) < len(prompt) + NEW:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            found["ids"].append(ids)
            found["log_probs"].append(log_probs(model, ids))
        for scheme in schemes:
            scheme.input_activations = None
        found["unrounded"] = [log_probs(model, ids) for ids in found["ids"] if schemes]
    return found


def log_probs(model: Any, ids: list[int]) -> list[float]:
    """Of all tokens but the first."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    found: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def by_vllm(python: Path, folders: Mapping[Path, Kind]) -> dict[Path, dict[str, Any]]:
    """The same prompts through its Python API: what each checkpoint gives, or `error`."""
    jobs = []
    for folder, kind in folders.items():
        adapter = str(folder / "adapter") if (folder / "adapter").exists() else None
        options = {"model": str(folder), "dtype": kind.dtype, "enforce_eager": True, "max_model_len": CONTEXT}
        options["trust_remote_code"] = (folder / "modeling_compress.py").exists()
        if adapter:
            options |= {"enable_lora": True, "max_lora_rank": int(served_line(folder).split("--max-lora-rank ")[1])}
        words = {"options": options, "adapter": adapter, "prompts": prompts(), "new": NEW}
        jobs.append(Path(f"{folder}.job.json"))
        jobs[-1].write_text(json.dumps(words), encoding="utf-8")
    answers = {folder: Path(f"{folder}.answer.json") for folder in folders}
    jobs = [job for job, answer in zip(jobs, answers.values(), strict=True) if not answer.exists()]
    if jobs:
        script = Path(__file__).with_name("engines_in_vllm.py")
        with Path(f"{jobs[0]}.log").open("w") as log:
            subprocess.run([python, script, *jobs], env=os.environ | ENVIRONMENT, stdout=log, stderr=log, check=True)
    died = {"error": "the process ended"}
    return {folder: json.loads(file.read_bytes()) if file.exists() else died for folder, file in answers.items()}


def served_line(folder: Path) -> str:
    """The command of the model card; empty where it says that vLLM cannot serve it."""
    card = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return next((line for line in card if line.startswith("vllm serve PATH")), "")


def by_server(python: Path, folder: Path, kind: Kind) -> dict[str, Any]:
    """The same prompts to vLLM's OpenAI server, started by the model card's line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, _, options = served_line(folder).replace("PATH", str(folder)).partition(str(folder))
    words = [*shlex.split(options), "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    words += ["--max-model-len", str(CONTEXT), *([] if "--dtype" in words else ["--dtype", kind.dtype])]
    # `vllm serve` asks for the version of a package vllm, which vllm-cpu is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *words]
    name = "corrected" if "--enable-lora" in words else str(folder)
    answer = Path(f"{folder}.served.json")
    if not answer.exists():
        with Path(f"{folder}.server.log").open("w") as log:
            server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
            try:
                found = asked(f"http://127.0.0.1:{port}", name, server)
            finally:
                server.terminate()
                server.wait(300)
        answer.write_text(json.dumps(found), encoding="utf-8")
    kept: dict[str, Any] = json.loads(answer.read_bytes())
    return kept


def asked(address: str, name: str, server: "subprocess.Popen[bytes]") -> dict[str, Any]:
    for _ in range(900):
        try:
            urlopen(f"{address}/health").close()
            break
        except URLError:
            if server.poll() is not None:
                return {"error": "the server ended"}
            time.sleep(1)
    found: dict[str, Any] = {"ids": [], "log_probs": []}
    for prompt in prompts():
        question = {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        question |= {"logprobs": 0, "return_token_ids": True}
        request = Request(
            f"{address}/v1/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as reply:
            (choice,) = json.load(reply)["choices"]
        found["ids"].append([*prompt, *choice["token_ids"]])
        found["log_probs"].append(choice["logprobs"]["token_logprobs"])  # of what it wrote
    return found


def by_llamacpp(folder: Path, ids: list[list[int]]) -> dict[str, Any]:
    """Log-probabilities of given texts."""
    file = next(folder.glob("*.gguf"), Path(f"{folder}.gguf"))
    try:
        if not file.exists():
            write_gguf(folder, file)
        engine = LlamaCpp(file, context=CONTEXT, vocabulary=WIDE["vocab_size"])
    except CompressError as error:
        return {"error": str(error)}
    return {"ids": ids, "log_probs": [engine.log_probs(each) for each in ids]}


def verdict(found: dict[str, Any], wanted: dict[str, Any], kind: Kind, most: float = EXACT) -> str:
    """A cell of the table; it has `WRONG` where an engine computes something else. most: nats."""
    if "error" in found:
        return f"refused: {reason(found['error'])}"
    if kind.rounds:
        error = mean_difference(found["log_probs"], wanted["log_probs"])
        spread = torch.tensor(wanted["log_probs"][0]).std()  # llama.cpp rounds inputs, transformers does not
        change = mean_difference(found["log_probs"], wanted["unrounded"]) if wanted["unrounded"] else 0.03 * spread
        alike = "runs" if error <= change else "overflows" if "int8" in kind.words and not has_vnni() else WRONG
        return f"{alike} (mean {error:.0e})"
    if found["ids"] != wanted["ids"]:
        return f"{WRONG} other tokens"
    pairs = zip(found["log_probs"], wanted["log_probs"], strict=True)
    error = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs[-len(ours) :], strict=True))
    return f"{WRONG if error > most else 'reads' if found.get('plain') else 'runs'} ({error:.0e})"


def mean_difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Over the prompts."""
    errors = [
        abs(a - b)
        for prompt, one, other in zip(prompts(), ours, theirs, strict=True)
        for a, b in zip(one[: len(prompt) - 1], other[: len(prompt) - 1], strict=True)
    ]
    return sum(errors) / len(errors)


def reason(error: str) -> str:
    """The first sentence of a message, without a path of this machine."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    line = lines[1] if lines[0].startswith("ValidationError") and len(lines) > 1 else lines[0]
    line = line.partition(". ")[0]
    return re.sub(r"'?/[^ ']*/[^ ']*'?", "the folder", line).removesuffix(" Reasons:").replace("|", "/")[:160]


def write(kind: Kind, folder: Path) -> Path:
    """The checkpoint of a kind. The proof by reloading is left out: transformers loads it below."""
    pipeline.verify = pipeline.verify_tokens = lambda *_arguments, **_options: 0.0
    dense, out = folder / kind.family, folder / "-".join(kind.name.replace(",", "").split())
    if out.exists():
        return out
    if not dense.exists():
        tiny.write_model(dense, kind.family, dtype=torch.float32, **{**WIDE, **DENSE[kind.family]})
    data = ["--calib", str(folder / "text.txt"), "--samples", "16", "--seq-len", "32", "--out", str(out)]
    ran = invoke(*shlex.split(kind.words), "--model", str(dense), *data)
    if ran.code:
        raise SystemExit(f"{kind.name}: {ran.err}")
    return out


def row(kind: Kind, folder: Path, by_api: dict[str, Any], python: Path) -> str:
    wanted = by_transformers(folder)
    cells = [kind.name, f"`{kind.words}`", "runs", verdict(by_api, wanted, kind)]
    if cells[-1].startswith(("runs", "reads")) and not served_line(folder):
        cells[-1] = f"{WRONG} the model card says that it does not run"
    if kind.served:
        cells[-1] += f"; its server {verdict(by_server(python, folder, kind), wanted, kind)}"
    has_file = kind.gguf or next(folder.glob("*.gguf"), None)
    most = HALF if kind.family in GELU else EXACT
    cells.append(verdict(by_llamacpp(folder, wanted["ids"]), wanted, kind, most) if has_file else "")
    print(" | ".join(cells), flush=True)
    return f"| {' | '.join(cells)} |"


def head(python: Path) -> str:
    asked = [str(python), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
    vllm = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    engines = ["checkpoint", "made by `compress`", f"transformers {version('transformers')}", f"vLLM {vllm}, CPU"]
    engines.append(f"llama.cpp (xllamacpp {version('xllamacpp')})")
    when = f"Date: {date.today().isoformat()}. torch {version('torch')}, {processor()}.\n\n"
    command = "    scripts/serve_check --write docs/engines.md\n\n"
    return f"{when}{command}| {' | '.join(engines)} |\n|{'---|' * len(engines)}\n"


def cpu_flags() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()


def has_vnni() -> bool:
    """Without it oneDNN adds products of 8-bit integers in pairs into 16 bits, which large ones do not fit."""
    return any("vnni" in flag for flag in cpu_flags())


def processor() -> str:
    """What decides which kernels a CPU has."""
    widest = next((flag for flag in ("amx_tile", "avx512f", "avx2") if flag in cpu_flags()), "no AVX2")
    return f"a CPU with {widest}{'' if has_vnni() else ', without VNNI'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="python of an environment that has vLLM")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", default="", help="a pattern of the names of kinds")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints and answers: what it has is not made again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)).resolve()
        folder.mkdir(exist_ok=True)
        tiny.write_text(folder / "text.txt")
        kinds = [kind for kind in KINDS if re.search(options.only, kind.name)]
        python, folders = options.vllm.absolute(), {write(kind, folder): kind for kind in kinds}
        found = by_vllm(python, folders)
        rows = [row(kind, folder, found[folder], python) for folder, kind in folders.items()]
    if any(WRONG in each for each in rows):
        raise SystemExit("Some of it is not as it should be; nothing is written.")
    if options.write is not None:
        marked.write(head(options.vllm) + "\n".join(rows) + "\n", options.write, "engines")


if __name__ == "__main__":
    main()
