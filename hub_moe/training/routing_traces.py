"""Reads the routing traces of ESFT (arXiv:2407.01906) into an expert profile.

A folder holds one file a layer, `layer_N.txt` (ESFT's own script writes `expert_weights_N.txt`), one line a sequence:
the expert ids of all its tokens, K a token, tab-separated, then two tabs, then their gate weights in the same order.
"""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..anatomy import DomainProfile, ExpertProfile, LayerProfile
from ..errors import DatasetError

_FILE_NAME = re.compile(r"(?:layer|expert_weights)_(\d+)\.txt")
_STRAY = re.compile(r"[^-+.\deE\t]")  # int() and float() take blanks, underscores and other alphabets' digits


def read_traces(folder: str | Path, *, num_experts: int, top_k: int, domain: str, model: str) -> ExpertProfile:
    """The profile of the model that wrote the traces; one line is in memory at a time.

    Gate weights are added up in the order of the file, in float64, as ESFT's own script does. The profile's dataset is
    the folder's name and the sha256 of its files, one after another by layer.

    Raises:
        DatasetError: If a line is malformed (naming file and line), a layer is missing between the first and the last,
            or layers differ in their sequences or tokens.
        OSError: If the folder or a file cannot be read.
    """
    paths = _find_files(Path(folder))
    digest = hashlib.sha256()
    layers: dict[int, LayerProfile] = {}
    lengths: dict[int, list[int]] = {}
    for index, path in paths.items():
        layers[index], lengths[index] = _read_layer(path, digest, num_experts=num_experts, top_k=top_k)
    first = min(paths)
    for index in paths:
        _check_same_tokens(paths[first], lengths[first], other=paths[index], other_lengths=lengths[index])
    dataset = {"routing_traces": Path(folder).resolve().name, "sha256": digest.hexdigest()}
    profile = DomainProfile(dataset, sum(lengths[first]), len(lengths[first]), layers)
    return ExpertProfile(model, None, top_k, {domain: profile})


def _find_files(folder: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match and (index := int(match.group(1))) in found:
            raise DatasetError(f"{folder} has two traces of layer {index}: {found[index].name} and {path.name}.")
        if match:
            found[int(match.group(1))] = path
    if not found:
        raise DatasetError(f"{folder} holds no routing traces; expected one layer_N.txt a layer.")
    missing = sorted(set(range(min(found), max(found))) - set(found))
    if missing:
        raise DatasetError(
            f"{folder} has traces of layers {min(found)} to {max(found)}, but none of layer "
            f"{', '.join(map(str, missing))}."
        )
    return dict(sorted(found.items()))


def _read_layer(path: Path, digest: Any, *, num_experts: int, top_k: int) -> tuple[LayerProfile, list[int]]:
    """The sums of one layer, and the number of tokens of each of its sequences."""
    tokens, gate_mass, lengths = [0] * num_experts, [0.0] * num_experts, []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            digest.update(line)
            try:
                experts, weights = _parse_line(line.decode("ascii", "replace"), num_experts=num_experts, top_k=top_k)
            except ValueError as error:
                raise DatasetError(f"{path}, line {number}: {error}.") from error
            for expert, weight in zip(experts, weights, strict=True):
                tokens[expert] += 1
                gate_mass[expert] += weight
            lengths.append(len(experts) // top_k)
    if not lengths:
        raise DatasetError(f"{path} is empty.")
    return LayerProfile(tuple(tokens), tuple(gate_mass)), lengths


def _parse_line(line: str, *, num_experts: int, top_k: int) -> tuple[list[int], list[float]]:
    line = line.rstrip("\r\n")
    if stray := _STRAY.search(line):
        raise ValueError(f"{stray.group()!r} at character {stray.start() + 1} belongs to no number")
    parts = line.split("\t\t")
    if len(parts) != 2:
        raise ValueError(f"expected expert ids, two tabs and gate weights, found {len(parts)} part(s)")
    experts = _parse_numbers(int, parts[0], "an expert id")
    weights = _parse_numbers(float, parts[1], "a gate weight")
    if len(experts) != len(weights):
        raise ValueError(f"{len(experts)} expert ids but {len(weights)} gate weights")
    if len(experts) % top_k:
        raise ValueError(f"{len(experts)} expert ids are not {top_k} for each token")
    _check_experts(experts, num_experts=num_experts, top_k=top_k)
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"gate weight {weight} is not a finite number of at least 0")
    return experts, weights


def _check_experts(experts: list[int], *, num_experts: int, top_k: int) -> None:
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise ValueError(f"expert id {expert} is not one of 0 to {num_experts - 1}")
    for start in range(0, len(experts), top_k):
        chosen = experts[start : start + top_k]
        if len(set(chosen)) < top_k:
            raise ValueError(f"token {start // top_k + 1} goes to one expert twice, {chosen}")


def _parse_numbers(number: Callable[[str], Any], texts: str, what: str) -> list[Any]:
    numbers = []
    for text in texts.split("\t"):
        try:
            numbers.append(number(text))
        except ValueError:
            raise ValueError(f"{text[:40]!r} is not {what}") from None
    return numbers


def _check_same_tokens(first: Path, lengths: list[int], *, other: Path, other_lengths: list[int]) -> None:
    if len(lengths) != len(other_lengths):
        raise DatasetError(f"{other} has {len(other_lengths)} sequences, but {first} has {len(lengths)}.")
    for number, (ours, theirs) in enumerate(zip(lengths, other_lengths, strict=True), start=1):
        if ours != theirs:
            raise DatasetError(f"{other}, line {number}: {theirs} tokens, but {first} has {ours} in this line.")
