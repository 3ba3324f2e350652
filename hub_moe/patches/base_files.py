"""Finds the tensors that a patch changes in the files of its base, without loading a model.

Files have names of their own (Mixtral's `block_sparse_moe.experts.5.w1.weight`) or stacks of all experts; what a
tensor in memory is called there shows in its bytes, whose sha256 the patch knows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from .metadata import PatchMetadata, TensorRecord
from .names import ExpertTensorName, parse_expert_name
from .tensor_file import TensorPlace, read_places

INDEX_FILE = "model.safetensors.index.json"
_GATE_UP_HALVES = {"gate_proj.weight": 0, "up_proj.weight": 1}


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where it has one.

    Raises:
        CheckpointError: If there are none, or the index is damaged.
    """
    files_by_name = _read_index(folder)
    names = ["model.safetensors"] if files_by_name is None else sorted(set(files_by_name.values()))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}; a checkpoint in safetensors format was expected.")
    return [folder / name for name in names]


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> name of the file that holds it; None if there is no index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        files_by_name = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        files = set(files_by_name.values())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index: 'weight_map' was expected in it.") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder} lacks {name}; a checkpoint in safetensors format was expected.")
    return files_by_name


def read_checkpoint_places(folder: Path, files: Sequence[str] | None = None) -> dict[str, TensorPlace]:
    """Every tensor of a checkpoint folder, or of some `files` of it, by its name on disk; reads headers only."""
    places: dict[str, TensorPlace] = {}
    for path in find_weight_files(folder) if files is None else [folder / name for name in files]:
        places |= read_places(path)
    return places


def find_shards(folder: Path, names: Iterable[str]) -> list[str]:
    """The weight files that may hold tensors of these names in memory, by the index in `folder`, if there is one.

    A name that the index does not know may be a part of any tensor of its layer, or if it has none, of any at all.

    Raises:
        CheckpointError: If the index is damaged.
    """
    files_by_name = _read_index(folder)
    if files_by_name is None:
        return ["model.safetensors"]
    shards = set()
    for name in names:
        expert = parse_expert_name(name)
        stacks = [f"{expert.block}.experts.{stack}" for stack in _stack_names(expert.tensor)] if expert else []
        known = [each for each in (name, *stacks) if each in files_by_name]
        inside = f".{expert.layer}." if expert else ""
        shards |= {files_by_name[each] for each in known[:1] or files_by_name if known or inside in each}
    return sorted(shards)


def locate_tensors(places: Mapping[str, TensorPlace], metadata: PatchMetadata) -> dict[str, TensorPlace]:
    """Where the files hold the tensors that a patch changes: whole tensors, or parts of a stack, by name in memory.

    Looked for by name first, so a tensor found so may have other values; then by its bytes. What is not found, or found
    twice, is left out.
    """
    located = {name: _locate_by_name(places, name, record) for name, record in metadata.tensors.items()}
    found = {name: place for name, place in located.items() if place is not None}
    return found | _locate_by_content(places, {n: r for n, r in metadata.tensors.items() if n not in found})


def find_fault(place: TensorPlace | None, record: TensorRecord) -> str | None:
    """Why what lies in the base's files is not the tensor that the patch was made for; None if it is."""
    if place is None:
        return "is not in its files, by name or by content"
    if place.dtype not in record.before:
        return f"is stored as {place.dtype}, and the patch knows it in {', '.join(record.before)} only"
    if place.hash() != record.before[place.dtype]:
        return "has other values"
    return None


def _locate_by_name(places: Mapping[str, TensorPlace], name: str, record: TensorRecord) -> TensorPlace | None:
    if name in places:
        return places[name] if places[name].shape == record.shape else None
    expert = parse_expert_name(name)
    if expert is None:
        return None
    stacks = (f"{expert.block}.experts.{stack}" for stack in _stack_names(expert.tensor))
    stack = next((places[each] for each in stacks if each in places), None)
    if stack is None or not stack.shape or expert.expert >= stack.shape[0]:
        return None
    parts = {part.name: part for part in _parts_of_row(stack, expert, record.shape)}
    half = _GATE_UP_HALVES.get(expert.tensor)
    return parts.get("whole") if half is None else parts.get(f"half {half}")


def _stack_names(tensor: str) -> tuple[str, ...]:
    if tensor in _GATE_UP_HALVES:
        return ("gate_up_proj",)
    return (tensor, tensor.removesuffix(".weight"))


def _locate_by_content(places: Mapping[str, TensorPlace], wanted: Mapping[str, TensorRecord]) -> dict[str, TensorPlace]:
    """The candidates with the right shape are hashed, layer by layer."""
    by_layer: dict[str, dict[str, list[TensorPlace]]] = {}
    found = {}
    for name, record in wanted.items():
        expert = parse_expert_name(name)
        layer = f".{expert.layer}." if expert else ""
        key = f"{layer} {record.shape}"
        if key not in by_layer:
            by_layer[key] = {}
            for place in _candidates(places, layer, record.shape):
                by_layer[key].setdefault(place.hash(), []).append(place)
        matches = [place for sha256 in set(record.before.values()) for place in by_layer[key].get(sha256, ())]
        if len(matches) == 1:
            found[name] = replace(matches[0], name=name)
    return found


def _candidates(places: Mapping[str, TensorPlace], layer: str, shape: tuple[int, ...]) -> Iterator[TensorPlace]:
    for name, place in places.items():
        if layer not in name:
            continue
        if place.shape == shape:
            yield place
        elif len(place.shape) == len(shape) + 1:
            for row in range(place.shape[0]):
                yield from _parts_of_row(place, ExpertTensorName("", 0, row, ""), shape)


def _parts_of_row(stack: TensorPlace, expert: ExpertTensorName, shape: tuple[int, ...]) -> Iterator[TensorPlace]:
    """The row of an expert in a stack, or its halves: whichever have the shape."""
    inner = stack.shape[1:]
    row_bytes = stack.size_bytes // stack.shape[0]
    start = stack.offset + expert.expert * row_bytes
    if inner == shape:
        yield replace(stack, name="whole", shape=shape, offset=start, size_bytes=row_bytes)
    elif len(inner) == len(shape) and inner[0] == 2 * shape[0] and inner[1:] == shape[1:]:
        for half in (0, 1):
            offset = start + half * (row_bytes // 2)
            yield replace(stack, name=f"half {half}", shape=shape, offset=offset, size_bytes=row_bytes // 2)
