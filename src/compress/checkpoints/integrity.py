"""Whether a folder is the checkpoint that was written: each of its files against compress.json."""

from collections.abc import Iterable
from pathlib import Path

from compress.checkpoints.files import ADAPTER_WEIGHTS, code_modules
from compress.checkpoints.metadata import METADATA, Metadata
from compress.errors import CheckpointError, Problems
from compress.io import sha256
from compress.models.tensor_files import ADAPTER, INDEX, StoredTensor, indexed_names, is_own_name, read_header
from compress.models.untrusted import read_json
from compress.progress import Progress, Steps

SHOWN = 8  # problems that are told one by one
AGAIN = "Get it again."


def check_integrity(folder: Path, metadata: Metadata, *, checksums: bool, progress: Progress) -> None:
    """That every file is there as it was written. Raises CheckpointError with all that is not.

    checksums: whether the weights are read too, to compare their sha256.
    """
    if metadata.form == "gguf":
        check_gguf(folder, metadata, checksums=checksums)
        return
    problems = Problems()
    problems.check(check_config, folder, metadata)
    problems.check(check_parts_named, folder, metadata)
    names, headers = [name for name in metadata.parts if is_plain(name)], dict[str, list[StoredTensor] | None]()
    steps = Steps(progress, "checking files", len(names))
    for name in names:
        steps.next(name)
        headers[name] = problems.check(check_file, folder, name, metadata.parts[name] if checksums else None)
    steps.end()
    problems.check(check_adapter, folder, metadata)
    if not problems.found:
        weights = [tensor for name, found in headers.items() if name != ADAPTER_WEIGHTS for tensor in found or ()]
        problems.check(check_mapped, folder, weights)
        problems.check(check_totals, folder, metadata, weights)
        problems.check(check_carried, folder, metadata)
    if problems.found:
        told = list(dict.fromkeys(str(problem) for problem in problems.found))  # an adapter's weights are a part, too
        more = [f"And {len(told) - SHOWN} more."] if len(told) > SHOWN else []
        raise CheckpointError("\n".join([f"{folder} is not as it was written:", *told[:SHOWN], *more]))


def check_gguf(folder: Path, metadata: Metadata, *, checksums: bool) -> None:
    """That the folder's one file of weights is there, and as it was written."""
    for name, checksum in metadata.parts.items():
        if not is_own_name(name) or not (folder / name).is_file():
            raise CheckpointError(f"{folder / METADATA} names {name!r}, which is not there. {AGAIN}")
        check_bytes(folder / name, checksum if checksums else None)


def is_plain(name: str) -> bool:
    """Whether a name stays in its folder: that of a part, or of the adapter."""
    return name == ADAPTER_WEIGHTS or (is_own_name(name) and name.endswith(".safetensors"))


def check_config(folder: Path, metadata: Metadata) -> None:
    file = folder / "config.json"
    config = read_json(file)
    named = config.get("architectures")
    if named != [metadata.architecture]:
        raise CheckpointError(f"{file} says {named!r}, {METADATA} {metadata.architecture!r}. {AGAIN}")
    packed = metadata.form == "packed" and metadata.quantized
    if packed != ("quantization_config" in config):
        has = "has no" if packed else "has a"
        raise CheckpointError(f"{file} {has} quantization_config, unlike {METADATA}. {AGAIN}")


def check_parts_named(folder: Path, metadata: Metadata) -> None:
    """That index, folder and compress.json speak of the same files, all of the folder's own."""
    foreign = [name for name in metadata.parts if not is_plain(name)]
    if foreign:
        raise CheckpointError(f"{folder / METADATA} names {foreign[0]!r}, which is no part in this folder. {AGAIN}")
    parts = set(metadata.parts) - {ADAPTER_WEIGHTS}
    read_json(folder / INDEX)
    indexed = set(indexed_names(folder / INDEX))
    if indexed != parts:
        other = min(indexed ^ parts)
        who = (INDEX, METADATA) if other in indexed else (METADATA, INDEX)
        raise CheckpointError(f"{other} is in {who[0]} and not in {who[1]}. {AGAIN}")
    left = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in parts)
    if left:
        raise CheckpointError(f"{folder / left[0]} is no part of the checkpoint. Move it elsewhere.")


def check_file(folder: Path, name: str, checksum: str | None) -> list[StoredTensor]:
    """The tensors of a file that is as it was written."""
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is missing. {AGAIN}")
    found = read_header(folder / name)
    check_bytes(folder / name, checksum)
    return found


def check_bytes(file: Path, checksum: str | None) -> None:
    try:
        differs = checksum is not None and sha256(file) != checksum
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).") from error
    if differs:
        raise CheckpointError(f"{file} has other bytes than were written: its sha256 is not {METADATA}'s. {AGAIN}")


def check_mapped(folder: Path, tensors: Iterable[StoredTensor]) -> None:
    """That each tensor is in one file, the one that the index says."""
    mapped = read_json(folder / INDEX)["weight_map"]
    stored: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in stored:
            files = f"{stored[tensor.name]} and {tensor.file.name}"
            raise CheckpointError(f"{folder} has the tensor {tensor.name!r} in both {files}. {AGAIN}")
        stored[tensor.name] = tensor.file.name
    if stored != mapped:
        name = next(name for name in sorted(stored.keys() | mapped.keys()) if stored.get(name) != mapped.get(name))
        where = f"is in {stored[name]}" if name in stored else "is in no file"
        raise CheckpointError(f"The tensor {name!r} {where}; {INDEX} says {mapped.get(name, 'nothing')!r}. {AGAIN}")


def check_totals(folder: Path, metadata: Metadata, tensors: Iterable[StoredTensor]) -> None:
    totals = read_json(folder / INDEX).get("metadata")
    totals = totals if isinstance(totals, dict) else {}
    found = sum(tensor.bytes for tensor in tensors)
    adapter = sum(tensor.bytes for tensor in adapter_tensors(folder, metadata))
    for what, said, true in (
        (f"{INDEX} says total_size", totals.get("total_size"), found),
        (f"{INDEX} says total_parameters", totals.get("total_parameters"), metadata.size.parameters),
        (f"{METADATA} says bytes", metadata.size.bytes, found + adapter),
    ):
        if said != true:
            raise CheckpointError(f"{folder / what} {said!r}, but it is {true:,}. {AGAIN}")


def check_adapter(folder: Path, metadata: Metadata) -> None:
    """That the adapter is the one that compress.json describes; its weights' checksum, if any, is among the parts'."""
    beside, file = folder / ADAPTER, folder / ADAPTER / "adapter_config.json"
    if metadata.adapter is None:
        if beside.exists():
            raise CheckpointError(f"{beside} is no part of the checkpoint. Move it elsewhere.")
    elif read_json(file) != metadata.adapter.to_dict():
        raise CheckpointError(f"{file} is not the adapter's in {METADATA}. {AGAIN}")
    adapter_tensors(folder, metadata)


def adapter_tensors(folder: Path, metadata: Metadata) -> list[StoredTensor]:
    return [] if metadata.adapter is None else check_file(folder, ADAPTER_WEIGHTS, None)


def check_carried(folder: Path, metadata: Metadata) -> None:
    """That the code is there which the checkpoint says it brings along."""
    file = folder / "config.json"
    modules = code_modules(read_json(file).get("auto_map"))
    if metadata.loads_without_our_code is bool(modules):
        raise CheckpointError(f"{file} and {METADATA} differ on whether it brings code along. {AGAIN}")
    for module in sorted(modules):
        if not module.isidentifier() or not (folder / f"{module}.py").is_file():
            raise CheckpointError(f"{file} names the module {module!r}, which is not there. {AGAIN}")
