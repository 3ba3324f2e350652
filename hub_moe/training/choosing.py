"""Which experts a run of method `experts` trains: as a file says, or by their profile on the run's own rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..anatomy import ExpertProfile
from ..data import PreparedData
from ..errors import ConfigError
from .method_config import ExpertsMethod, Method
from .profiling import Sample, profile_experts
from .run_config import RunConfig
from .run_folder import TrainingFolder
from .selection import ExpertChoice, score_experts, select_experts
from .session import fit_rows

_ROWS_AT_A_TIME = 8


@dataclass(frozen=True)
class Chosen:
    """A choice, and the profile it was made by, None where a file says it."""

    choice: ExpertChoice
    profile: ExpertProfile | None


def find_choice(base: Any, data: PreparedData, config: RunConfig, folder: TrainingFolder) -> ExpertChoice | None:
    """The choice, None for other methods; it is written into the folder, and read from there by a resumed run.

    Raises:
        ConfigError: If the choice file cannot be read.
    """
    if not isinstance(config.method, ExpertsMethod):
        return None
    if folder.choice.exists():
        return ExpertChoice.load(folder.choice)
    chosen = choose_experts(base, data, config, config.method)
    if chosen.profile is not None:
        chosen.profile.save(folder.profile)
    chosen.choice.save(folder.choice)
    return chosen.choice


def choose_experts(base: Any, data: PreparedData, config: RunConfig, method: ExpertsMethod) -> Chosen:
    """The choice of the file that the method names, or by the scores of experts on training rows.

    Raises:
        ConfigError: If the choice file cannot be read.
    """
    choice = read_choice_file(method)
    if choice is not None:
        return Chosen(choice, None)
    assert method.score is not None
    assert method.sample_rows is not None
    profile = profile_rows(base, data, config, num_rows=method.sample_rows)
    scores = score_experts(profile, score=method.score)
    chosen = select_experts(scores, top_p=method.top_p, share=method.share)
    selected = ExpertChoice(chosen.experts, bool(method.shared_experts), bool(method.non_expert_modules))
    return Chosen(selected, profile)


def profile_rows(base: Any, data: PreparedData, config: RunConfig, *, num_rows: int) -> ExpertProfile:
    """The expert profile of the first training rows, which are in random order."""
    sample = Sample(
        rows=[data.train[row] for row in range(min(num_rows, len(data.train)))],
        collator=data.collator(),
        batch_size=fit_rows(config.data, _ROWS_AT_A_TIME) if data.packing else _ROWS_AT_A_TIME,
        dataset=data.report.provenance.to_dict(),
    )
    return profile_experts(
        base, sample, name=str(config.model.name), revision=config.model.revision, domain="training rows"
    )


def read_choice_file(method: Method) -> ExpertChoice | None:
    """The choice in the file that the method names; None where it names none.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if not isinstance(method, ExpertsMethod) or method.choice is None:
        return None
    path = Path(method.choice).expanduser()
    try:
        choice = ExpertChoice.load(path)
    except OSError as error:
        raise ConfigError(f"[method] choice {method.choice} cannot be read: {error.strerror}.") from error
    shared = choice.shared_experts if method.shared_experts is None else method.shared_experts
    others = choice.non_expert_modules if method.non_expert_modules is None else method.non_expert_modules
    return ExpertChoice(choice.experts, shared, others)
