"""Token ids through vLLM's Python API, in its own environment: what it writes after each prompt, and how likely.

    VLLM/bin/python engines_in_vllm.py A.job.json B.job.json ...     writes A.answer.json, B.answer.json

Each job runs in a fork of this process, which has imported vLLM. A job has `options` of `vllm.LLM`, `adapter`, the
folder of one or null, `prompts`, lists of ids, and `new`, how many tokens to write. An answer has `ids`, prompts and
what was written, `log_probs` of all but the first, with an adapter of what was written, `model`, the class of vLLM's
that ran, and `plain`, whether `add_plain_kernel` multiplied; or `error`, what vLLM raised.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what it raises is raised in this process


def answer(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    used = add_plain_kernel()
    engine = LLM(**job["options"])
    adapter = LoRARequest("corrected", 1, job["adapter"]) if job["adapter"] else None
    greedy = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, logprobs=0)
    if not adapter:  # with one, its CPU code fails on them
        greedy.prompt_logprobs = 0
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    found: dict[str, Any] = {
        "ids": [],
        "log_probs": [],
        "model": engine.apply_model(class_name)[0],
        "plain": bool(used),
    }
    for prompt, reply in zip(job["prompts"], engine.generate(prompts, greedy, lora_request=adapter), strict=True):
        (written,) = reply.outputs
        ids = [*prompt, *written.token_ids]
        steps = [*(reply.prompt_logprobs or [])[1:], *written.logprobs]
        found["ids"].append(ids)
        scored = zip(steps, ids[-len(steps) :], strict=True)
        found["log_probs"].append([step[token].logprob for step, token in scored])
    return found


def add_plain_kernel() -> list[Any]:
    """For packed integers beside inputs that are not rounded, where vLLM's build for this CPU has no kernel of its own.

    Weights are multiplied out by plain torch from what vLLM has loaded and, for q, k and v, put together: so its
    loading is tested, not its kernels. The list that is handed back gets the layers that it has been used for.
    """
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding as embeddings
    from vllm.platforms import PlatformEnum

    used: list[Any] = []

    def codes(packed: Any, bits: int, count: int) -> Any:
        """Of each row `count` numbers of `bits` bits without gaps, the low ones first."""
        planes = (packed.contiguous().view(torch.uint8)[..., None] >> torch.arange(8)) & 1
        numbers = planes.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
        return (numbers << torch.arange(bits)).sum(-1)

    class PlainKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, _config: Any) -> tuple[bool, None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            used.append(layer)
            (n, m), bits = self.config.partition_weight_shape, self.config.weight_type.size_bits
            packed, scale, zero = self._get_weight_params(layer)
            zeros = self.config.weight_type.bias if zero is None else codes(zero.T, bits, m).T
            levels = codes(packed, bits, n).unflatten(1, (scale.shape[1], -1))
            steps = scale[..., None] * (levels - (zeros if zero is None else zeros[..., None]))
            layer.plain = steps.flatten(1).to(scale.dtype)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)

    def gathered(ids: Any, packed: Any, scale: Any, width: int, bits: int) -> Any:
        used.append(packed)
        levels = codes(packed[ids], bits, width) - (1 << (bits - 1))
        return (levels.unflatten(1, (scale.shape[1], -1)) * scale[ids][..., None]).flatten(1)

    embeddings._dequant_gather_triton = gathered
    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        kernels.remove(linear.CPUWNA16LinearKernel)
    kernels.append(PlainKernel)
    return used


def class_name(model: Any) -> str:
    return type(model).__name__


def main(jobs: list[str]) -> None:
    import vllm  # noqa: F401 (once for all)

    for job in map(Path, jobs):
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        try:
            found = answer(json.loads(job.read_text(encoding="utf-8")))
        except BaseException as error:  # whatever it is, it is the answer
            found = {"error": f"{type(error).__name__}: {error}"}
        Path(str(job).replace(".job.", ".answer.")).write_text(json.dumps(found), encoding="utf-8")
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
