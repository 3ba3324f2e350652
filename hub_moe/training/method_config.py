"""The [method] table of a run: what is trained, one dataclass for each method."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import ConfigError
from ..files.tables import key_names, read_table


@dataclass(frozen=True)
class FullMethod:
    """Everything is trained."""

    NAME: ClassVar[str] = "full"


@dataclass(frozen=True)
class PretrainMethod:
    """Everything is trained, from random weights."""

    NAME: ClassVar[str] = "pretrain"


@dataclass(frozen=True)
class ExpertsMethod:
    """Chosen experts are trained (ESFT, arXiv:2407.01906) and become an expert patch.

    Args:
        choice: A file with the choice (`expert_config.json` of ESFT); None chooses from the training rows.
        score: What the choice goes by: share of the gate mass, or of the tokens.
        top_p: Share of the score that the chosen experts of a layer reach together; or
        share: Share of all experts of the model, those with the highest scores.
        sample_rows: Training rows that are routed for the choice.
        shared_experts: Whether the shared experts are trained too; with a choice file, what the file says.
        non_expert_modules: Whether everything that is not an expert is trained too; likewise.
    """

    NAME: ClassVar[str] = "experts"

    choice: str | None = None
    score: Literal["gate", "token"] | None = None
    top_p: float | None = None
    share: float | None = None
    sample_rows: int | None = None
    shared_experts: bool | None = None
    non_expert_modules: bool | None = None

    def __post_init__(self) -> None:
        selection = {
            "score": self.score,
            "top_p": self.top_p,
            "share": self.share,
            "sample_rows": self.sample_rows,
        }
        given = [key for key, value in selection.items() if value is not None]
        if self.choice is not None and given:
            raise ConfigError(
                f"[method] has both choice and {given[0]}; a choice file needs no selection: leave out "
                f"{given[0]} (--set method.{given[0]}= takes it out)."
            )
        if self.top_p is not None and self.share is not None:
            raise ConfigError("[method] has both top_p and share; keep one (--set method.top_p= takes it out).")
        for key in ("top_p", "share"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"[method] {key} is {value}; expected a share above 0 and at most 1.")
        if self.sample_rows is not None and self.sample_rows < 1:
            raise ConfigError(f"[method] sample_rows is {self.sample_rows}; expected at least 1.")

    def resolve(self) -> "ExpertsMethod":
        """With the defaults of a selection filled in."""
        if self.choice is not None:
            return self
        return ExpertsMethod(
            score=self.score or "token",
            top_p=0.2 if self.top_p is None and self.share is None else self.top_p,
            share=self.share,
            sample_rows=self.sample_rows or 512,
            shared_experts=bool(self.shared_experts),
            non_expert_modules=bool(self.non_expert_modules),
        )


@dataclass(frozen=True)
class LoraMethod:
    """Low-rank adapters of peft.

    Args:
        target_modules: Linear modules by the end of their name, as peft takes them.
        target_parameters: Parameters by the end of their name, such as `mlp.experts.down_proj`: stacks of experts.
        routed_experts: Adds the stacks of all routed experts to `target_parameters`.
        accept_left_out: Modules that `target_modules` may name although peft gives them no adapter.
    """

    NAME: ClassVar[str] = "lora"

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    routed_experts: bool = False
    accept_left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"[method] r is {self.r}; expected at least 1.")
        if self.alpha <= 0:
            raise ConfigError(f"[method] alpha is {self.alpha}; expected more than 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"[method] dropout is {self.dropout}; expected a share below 1.")
        if self.dropout and (self.target_parameters or self.routed_experts):
            raise ConfigError("[method] dropout is not 0; peft has no dropout on adapters of experts.")
        if not (self.target_modules or self.target_parameters or self.routed_experts):
            raise ConfigError(
                "[method] names nothing to adapt; set target_modules, target_parameters or routed_experts = true."
            )


Method = FullMethod | PretrainMethod | ExpertsMethod | LoraMethod
_METHODS: dict[str, type[Method]] = {
    method.NAME: method for method in (FullMethod, ExpertsMethod, LoraMethod, PretrainMethod)
}


def read_method(table: Any) -> Method:
    """The method that a [method] table describes.

    Raises:
        ConfigError: If it names no method, or holds a key that is not one of this method.
    """
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise ConfigError(f"[method] needs the key name: {', '.join(_METHODS)}.")
    name = table["name"]
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_METHODS)}."
        raise ConfigError(f"[method] name is {name!r}; {hint}")
    for key in table:
        owners = [other for other, cls in _METHODS.items() if key in key_names(cls)]
        if owners and name not in owners:
            raise ConfigError(f"[method] has the key {key}, which is for {' and '.join(owners)} and not for {name}.")
    settings = {key: value for key, value in table.items() if key != "name"}
    method = read_table(_METHODS[name], settings, where="[method]")
    return method.resolve() if isinstance(method, ExpertsMethod) else method
