"""A GGUF file in llama.cpp itself: log-probabilities of given tokens, perplexity, and speed.

The package xllamacpp (the extra `llamacpp`) runs llama.cpp's server in this process. A given text is written token by
token, each forced by a bias; the log-probabilities are of the model's own distribution, before sampling.
llama.cpp rounds the inputs of quantized linears to 8 bits, so they differ a little from those of dequantized weights.
"""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from jaxtyping import Int64
from torch import Tensor

from compress.errors import CheckpointError, NumericalError, UsageError
from compress.evaluation.speed import spread
from compress.io import GGUF

FORCED = 1e6  # what is added to a logit
VERBOSE = "COMPRESS_LLAMACPP_LOG"


def package() -> Any:
    """llama.cpp as a module. Raises UsageError where it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError("llama.cpp needs the package xllamacpp: pip install compress-llm[llamacpp]") from error
    return xllamacpp


class LlamaCpp:
    """A file that llama.cpp has loaded, on the CPU.

    context: tokens of the longest text. vocabulary: tokens that there are. exact: keys, values and attention in
        float32, not in llama.cpp's usual float16.
    Raises UsageError where xllamacpp is missing, CheckpointError for a file that llama.cpp does not load.
    """

    def __init__(self, file: Path, *, context: int, vocabulary: int, exact: bool = True) -> None:
        self.vocabulary, xllamacpp = vocabulary, package()
        params: Any = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
        params.cpuparams.n_threads = torch.get_num_threads()
        params.n_gpu_layers, params.fit_params, params.warmup = 0, False, False
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = 0
        params.swa_full = True  # keeps what a text shares with the one before also with sliding windows
        params.verbosity = 1 if VERBOSE in os.environ else -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise CheckpointError(
                f"llama.cpp does not load {file}. {VERBOSE}=1 in the environment shows why."
            ) from error

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        """Of every token but the first, in nats, given those before it."""
        found = []
        for place, token in enumerate(ids[1:], 1):
            written = self._written(ids[:place], token, listed=1)
            if written is None:  # a part of a character, which the server does not report: from the list of all
                written = self._written(ids[:place], self._letter, listed=self.vocabulary)
            listed = [] if written is None else [written, *written["top_logprobs"]]
            if token not in (probabilities := {each["id"]: float(each["logprob"]) for each in listed}):
                raise NumericalError(f"llama.cpp gives no probability for token {token} in place {place} of the text.")
            found.append(probabilities[token])
        return found

    def loss(self, window: Int64[Tensor, "seq_len"]) -> float:
        """The mean negative log-probability of a window's tokens but the first, in nats."""
        return -sum(self.log_probs(window.tolist())) / (len(window) - 1)

    def speed(self, prompt: int, new: int) -> tuple[float, float]:
        """Tokens a second of prefill and of decoding, for a prompt of `prompt` tokens and `new` ones after it."""
        ids = torch.arange(prompt).remainder(self.vocabulary).tolist()
        timings = self._reply(ids, tokens=new, ignore_eos=True, cache_prompt=False)["timings"]
        return float(timings["prompt_per_second"]), float(timings["predicted_per_second"])

    def write(self, ids: Sequence[int], most: int) -> str:
        """Go on with a text greedily, up to the end that the model sets or `most` new tokens."""
        return str(self._reply(ids, tokens=most)["choices"][0]["text"])

    def tokenize(self, text: str) -> list[int]:
        words = json.dumps({"content": text, "add_special": False}).encode()
        request = Request(f"{self._server.listening_address}/tokenize", words, {"Content-Type": "application/json"})
        with urlopen(request) as reply:
            found: list[int] = json.load(reply)["tokens"]
        return found

    @cached_property
    def _letter(self) -> int:
        """A token that is whole characters."""
        return self.tokenize("a")[-1]

    def _written(self, ids: Sequence[int], token: int, *, listed: int) -> Any:
        """The next token, forced to be `token`, with the `listed` likeliest; None where it is not reported."""
        choice = self._reply(ids, tokens=1, logprobs=listed, logit_bias=[[token, FORCED]])["choices"][0]
        return choice["logprobs"] and choice["logprobs"]["content"][0]

    def _reply(self, ids: Sequence[int], *, tokens: int, **options: Any) -> Any:
        reply = self._server.handle_completions(
            {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, **options}
        )
        if "error" in reply:
            raise UsageError(f"llama.cpp refuses: {reply['error']['message']}.")
        return reply


def gguf_file(folder: Path, name: str) -> Path:
    """The file that a model's folder stands for. Raises UsageError where it is of another kind."""
    if not (folder / GGUF).exists():
        raise UsageError(
            f"llama.cpp reads GGUF files, {name} is none. Write one: compress quantize --type Q4_K_M, or --export gguf."
        )
    return (folder / GGUF).resolve()


def compare_speeds(
    files: Sequence[Path], vocabularies: Sequence[int], prompt: int, new: int, rounds: int
) -> list[dict[str, Any]]:
    """Bytes of files, and their tokens a second in turns: medians and quartiles of `prefill` and `decode`."""
    engines = [
        LlamaCpp(file, context=prompt + new, vocabulary=size, exact=False)
        for file, size in zip(files, vocabularies, strict=True)
    ]
    for engine in engines:  # caches and pages
        engine.speed(prompt, new)
    turns = [[engine.speed(prompt, new) for engine in engines] for _ in range(rounds)]
    found = []
    for file, rates in zip(files, zip(*turns, strict=True), strict=True):
        prefill, decode = map(spread, zip(*rates, strict=True))
        found.append({"bytes": file.stat().st_size, "prefill": prefill, "decode": decode})
    return found
