"""The expert profile: how much each expert of a model had to do on each domain of text.

One artefact that drives the choice of experts, offloading, pruning and cards. On disk it is JSON that people can read.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.json_files import read_json, write_json
from .routing import LayerRouting, Routing

FORMAT, VERSION = "hub_moe.expert_profile", 1


@dataclass(frozen=True)
class LayerProfile:
    """The experts of one layer on one domain: entry i of each tuple is expert i's sum over its tokens.

    `gate_mass` sums the routing weights that were used, `output_norm` the L2 norms of the expert's outputs, and
    `gated_output_norm` norm times weight; the norms are None where they were not recorded.
    """

    tokens: tuple[int, ...]
    gate_mass: tuple[float, ...]
    output_norm: tuple[float, ...] | None = None
    gated_output_norm: tuple[float, ...] | None = None

    @property
    def token_shares(self) -> tuple[float, ...]:
        """Each expert's share of the load; sums to 1, or is all 0 without tokens."""
        total = sum(self.tokens)
        return tuple(count / total if total else 0.0 for count in self.tokens)

    @property
    def gate_shares(self) -> tuple[float, ...]:
        """Each expert's share of the gate mass; sums to 1, or is all 0 without any."""
        total = math.fsum(self.gate_mass)
        return tuple(mass / total if total else 0.0 for mass in self.gate_mass)

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert over the mean load: 1 is even, and what a layer without tokens has."""
        return max(self.token_shares) * len(self.tokens) if any(self.tokens) else 1.0

    @property
    def num_dead(self) -> int:
        """Experts that got no token."""
        return self.tokens.count(0)

    @property
    def saliency(self) -> tuple[float, ...] | None:
        """Mean of weight times output norm over an expert's tokens, S_j of arXiv:2510.13999; 0 for a dead expert."""
        if self.gated_output_norm is None:
            return None
        return tuple(norm / max(1, count) for norm, count in zip(self.gated_output_norm, self.tokens, strict=True))


@dataclass(frozen=True)
class DomainProfile:
    """One domain: the text it was measured on, and the layers by their index in the checkpoint.

    `dataset` says where the text is from, with its revision or sha256: any JSON object.
    """

    dataset: Mapping[str, Any]
    num_tokens: int
    num_sequences: int
    layers: Mapping[int, LayerProfile]


@dataclass(frozen=True)
class ExpertProfile:
    """What each expert of one model did, by domain.

    `revision` is the commit of the model, where it has one; the numbers of parameters, of the whole model and of one
    routed expert, are None where only its routing is known.
    """

    model: str
    revision: str | None
    top_k: int
    domains: Mapping[str, DomainProfile]
    num_parameters: int | None = None
    num_per_expert: int | None = None

    @staticmethod
    def from_routing(
        routing: Routing,
        *,
        model: str,
        revision: str | None = None,
        domain: str,
        dataset: Mapping[str, Any],
        num_sequences: int,
    ) -> "ExpertProfile":
        """The profile of what `record_routing` watched. MTP layers, which draft and do not answer, are left out.

        Raises:
            ConfigError: If a sum is not finite, as with weights that are not a number.
        """
        layers = {routed.layer.index: _sum_up(routed) for routed in routing.layers if not routed.layer.is_mtp}
        top_k = routing.layers[0].layer.top_k
        num_tokens = max(sum(layer.tokens) for layer in layers.values()) // top_k
        profile = DomainProfile(dict(dataset), num_tokens, num_sequences, layers)
        sizes = (routing.num_parameters, routing.num_per_expert)
        return ExpertProfile(model, revision, top_k, {domain: profile}, *sizes)

    def domain(self, name: str | None = None) -> DomainProfile:
        """The domain of this name, or the only one.

        Raises:
            ConfigError: If there is no such domain, or no name is given and there are several.
        """
        if name is None and len(self.domains) == 1:
            return next(iter(self.domains.values()))
        if name is None or name not in self.domains:
            asked = "needs a domain" if name is None else f"has no domain {name!r}"
            raise ConfigError(f"The expert profile {asked}; it has {', '.join(map(repr, self.domains))}.")
        return self.domains[name]

    @staticmethod
    def merge(profiles: Iterable["ExpertProfile"]) -> "ExpertProfile":
        """One profile of several: shards of a domain are summed exactly, whatever their order; domains stand together.

        Shards are of one domain if name and dataset are equal.

        Raises:
            ConfigError: If there is none, they are of different models or shapes, a domain's name stands for two
                datasets, or only some shards have output norms.
        """
        profiles = list(profiles)
        if not profiles:
            raise ConfigError("Merging needs at least one expert profile.")
        first = profiles[0]
        for other in profiles[1:]:
            _check_same_model(first, other)
        names = dict.fromkeys(name for profile in profiles for name in profile.domains)
        domains = {
            name: _add_domains(name, [profile.domains[name] for profile in profiles if name in profile.domains])
            for name in names
        }
        return replace(first, domains=domains)

    def reduce(self) -> "ExpertProfile":
        """The profiles of all processes of `torch.distributed` merged, equal on every one; this one where there is one.

        Raises:
            ConfigError: If the processes profiled different models.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        profiles: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(profiles, self)
        return ExpertProfile.merge(profiles)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, whole or not at all.

        Raises:
            ConfigError: If a number is not finite.
            OSError: If it cannot be written.
        """
        data = {"format": FORMAT, "version": VERSION, **self.to_dict()}
        try:
            write_json(path, data)
        except ValueError as error:
            raise ConfigError(f"The expert profile of {self.model} holds a number that is not finite.") from error

    @staticmethod
    def load(path: str | Path) -> "ExpertProfile":
        """Read what `save` wrote.

        Raises:
            ConfigError: If the file is damaged, something else, or of a newer version.
            OSError: If it cannot be read.
        """
        data = read_json(path, "an expert profile")
        if data.get("format") != FORMAT:
            raise ConfigError(f"{path} is not an expert profile: its format is {data.get('format')!r}, not {FORMAT!r}.")
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{path} is an expert profile of version {data.get('version')!r}; this hub_moe reads {VERSION}."
            )
        try:
            return _parse_profile(data)
        except (KeyError, TypeError, ValueError) as error:
            missing = "it lacks " if isinstance(error, KeyError) else ""
            raise ConfigError(f"{path} is not a whole expert profile: {missing}{error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        domains = {
            name: {
                "dataset": dict(domain.dataset),
                "num_tokens": domain.num_tokens,
                "num_sequences": domain.num_sequences,
                "layers": _list_layers(domain.layers),
            }
            for name, domain in self.domains.items()
        }
        facts = {field: value for field, value in vars(self).items() if field != "domains"}
        return {**facts, "domains": domains}


_SUMS = ("gate_mass", "output_norm", "gated_output_norm")


def _sum_up(routed: LayerRouting) -> LayerProfile:
    gate_mass, norm, gated = (
        None if sums_E is None else tuple(sums_E.tolist())
        for sums_E in (routed.gate_mass_E, routed.output_norm_E, routed.gated_output_norm_E)
    )
    assert gate_mass is not None
    if not all(math.isfinite(value) for value in (*gate_mass, *(norm or ()), *(gated or ()))):
        raise ConfigError(
            f"The routing of {routed.layer.name} holds numbers that are not finite; look for NaN in the model's "
            "weights, or load it in another dtype."
        )
    return LayerProfile(tuple(routed.tokens_E.tolist()), gate_mass, norm, gated)


def _check_same_model(first: ExpertProfile, other: ExpertProfile) -> None:
    ours, theirs = ((profile.model, profile.revision) for profile in (first, other))
    if ours != theirs:
        raise ConfigError(
            f"Expert profiles of different models do not merge: {ours[0]} at {ours[1]}, {theirs[0]} at {theirs[1]}."
        )
    if first.top_k != other.top_k or _shape(first) != _shape(other):
        raise ConfigError(f"Two expert profiles of {first.model} differ in layers, experts or experts per token.")


def _shape(profile: ExpertProfile) -> dict[int, int]:
    domain = next(iter(profile.domains.values()))
    return {index: len(layer.tokens) for index, layer in sorted(domain.layers.items())}


def _add_domains(name: str, shards: list[DomainProfile]) -> DomainProfile:
    if any(dict(shard.dataset) != dict(shards[0].dataset) for shard in shards):
        raise ConfigError(f"The domain {name!r} stands for two datasets; give each its own name before merging.")
    return DomainProfile(
        dataset=shards[0].dataset,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_sequences=sum(shard.num_sequences for shard in shards),
        layers={index: _add_layers(name, [shard.layers[index] for shard in shards]) for index in shards[0].layers},
    )


def _add_layers(name: str, shards: list[LayerProfile]) -> LayerProfile:
    tokens = tuple(sum(counts) for counts in zip(*(shard.tokens for shard in shards), strict=True))
    sums: dict[str, tuple[float, ...] | None] = {}
    for field in _SUMS:
        values = [getattr(shard, field) for shard in shards]
        if any(value is None for value in values) and values.count(None) < len(values):
            raise ConfigError(f"Only some shards of the domain {name!r} have output norms, so they do not add up.")
        sums[field] = None if values[0] is None else tuple(map(math.fsum, zip(*values, strict=True)))
    assert sums["gate_mass"] is not None
    return LayerProfile(tokens, sums["gate_mass"], sums["output_norm"], sums["gated_output_norm"])


def _list_layers(layers: Mapping[int, LayerProfile]) -> dict[str, Any]:
    return {
        str(index): {field: list(values) for field, values in vars(layer).items() if values is not None}
        for index, layer in layers.items()
    }


def _parse_profile(data: Mapping[str, Any]) -> ExpertProfile:
    revision = None if data["revision"] is None else _typed(data, "revision", str)
    domains = {name: _parse_domain(name, domain) for name, domain in _typed(data, "domains", dict).items()}
    sizes = (_count(data, field) if data[field] is not None else None for field in ("num_parameters", "num_per_expert"))
    profile = ExpertProfile(_typed(data, "model", str), revision, _count(data, "top_k"), domains, *sizes)
    if not domains:
        raise ValueError("it has no domain")
    if any(_shape(profile) != _shape(replace(profile, domains={name: domains[name]})) for name in domains):
        raise ValueError("its domains differ in layers or experts")
    return profile


def _parse_domain(name: str, data: Any) -> DomainProfile:
    if not isinstance(data, dict):
        raise TypeError(f"domain {name!r} is no object")
    layers = {int(index): _parse_layer(index, layer) for index, layer in _typed(data, "layers", dict).items()}
    if not layers:
        raise ValueError(f"domain {name!r} has no layer")
    return DomainProfile(
        _typed(data, "dataset", dict), _count(data, "num_tokens"), _count(data, "num_sequences"), layers
    )


def _parse_layer(index: str, data: Any) -> LayerProfile:
    if not isinstance(data, dict):
        raise TypeError(f"layer {index} is no object")
    tokens = _typed(data, "tokens", list)
    if not tokens or not all(type(count) is int and count >= 0 for count in tokens):
        raise ValueError(f"the tokens of layer {index} are not counts")
    sums = {field: _typed(data, field, list) for field in _SUMS if field == "gate_mass" or field in data}
    for field, values in sums.items():
        if len(values) != len(tokens) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise ValueError(f"{field} of layer {index} is not {len(tokens)} finite numbers")
    return LayerProfile(tuple(tokens), **{field: tuple(map(float, values)) for field, values in sums.items()})


def _typed(data: Mapping[str, Any], field: str, expected: type) -> Any:
    if not isinstance(data[field], expected):
        raise TypeError(f"{field!r} is a {type(data[field]).__name__}, not a {expected.__name__}")
    return data[field]


def _count(data: Mapping[str, Any], field: str) -> int:
    if type(data[field]) is not int or data[field] < 0:
        raise ValueError(f"{field!r} is no count")
    return int(data[field])
