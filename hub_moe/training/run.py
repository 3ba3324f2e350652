"""A training run from its config to its folder: base, data, method, training, proof, result."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..anatomy import Fingerprint, compare_fingerprints, fingerprint
from ..bars import quiet_bars
from ..data import PreparedData, load_rows
from ..environment import describe_versions
from ..errors import HubMoeError, MissingExtraError
from ..experts import describe_for_record
from ..patches import hash_base
from . import outcome
from .checkpoints import explain_failed_writes, scratch_folder
from .choosing import find_choice, read_choice_file
from .method_config import ExpertsMethod, LoraMethod, PretrainMethod
from .methods import Prepared, make_whole, prepare_model
from .processes import count, device, in_first, is_first, wait_for_all
from .run_config import RunConfig
from .run_data import check_fit, check_packed_model, find_tokenizer, prepare_rows, report_data
from .run_folder import TrainingFolder, find_training_folder, open_training_folder, remove, write_atomically
from .run_inputs import FolderLock, check_inputs
from .run_model import Architecture, build_model, fit_vocabulary, load_base, read_architecture
from .session import Session, find_trackers, train
from .sharding import build_sharded, check_sharding, gather_whole, is_sharded, load_base_sharded


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the patch, adapter or model in it, the report, and the proof of what changed."""

    folder: Path
    result: Path
    report: dict[str, Any]
    changes: dict[str, Any]


def run_training(config: RunConfig, *, fresh: bool = False, say: Callable[[str], None] = print) -> RunResult:
    """Train as `config` says, and prove what was trained; the run folder then holds everything.

    An interrupted run goes on where it stopped when called again with an equal config, and ends as if it had never been
    interrupted; a finished one is only read. Under `torchrun` all processes call this; the first one writes.

    Args:
        config: Of the run.
        fresh: Remove an earlier run in the folder first.
        say: Is told in sentences what happens.

    Raises:
        ConfigError, DatasetError: If model, data, method or folder do not fit; before any training.
        DivergenceError: If a loss, gradient or weight is not finite; the last good checkpoint is kept.
        TrainingProofError: If a tensor changed that was not to be trained; no result is written.
        CheckpointError: If the folder cannot be written.
        KeyboardInterrupt: After Ctrl-C, with a checkpoint once training has begun.
    """
    with quiet_bars():
        return _Run(config, fresh=fresh, say=say if is_first() else lambda _: None).run()


class _Run:
    def __init__(self, config: RunConfig, *, fresh: bool, say: Callable[[str], None]) -> None:
        self.started_s = time.monotonic()
        self.say = say
        check_sharding(config.training)
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        self.architecture: Architecture = read_architecture(config.model)
        self.rows = load_rows(config.data.rows)
        self.config = config.with_revisions(model=self.architecture.revision, data=self.rows.provenance.revision)
        find_trackers(config.training)
        self.lock = FolderLock()
        self.folder: TrainingFolder = in_first(lambda: self._open_folder(fresh=fresh))

    def _open_folder(self, *, fresh: bool) -> TrainingFolder:
        self.lock.take(find_training_folder(self.config).settings)
        folder = open_training_folder(self.config, fresh=fresh)
        self.lock.take(folder.settings)  # a new file, if the folder was new
        choice = read_choice_file(self.config.method)
        with explain_failed_writes(folder.path):
            check_inputs(
                folder,
                {
                    "rows": self.rows.provenance.to_dict(),
                    **({"experts in its choice file": choice.to_dict()} if choice is not None else {}),
                },
            )
        return folder

    def run(self) -> RunResult:
        """The whole run; the folder is free for others afterwards."""
        try:
            return self._run()
        finally:
            self.lock.release()

    def _run(self) -> RunResult:
        config, folder = self.config, self.folder
        if folder.is_finished:
            self.say(f"{folder.path} holds this run, finished; --fresh starts it anew.")
            return self._read_result()
        self._settle_threads()
        tokenizer = find_tokenizer(config, self.rows, revision=self.architecture.revision)
        if config.model.learn_vocab_size is not None:
            fit_vocabulary(self.architecture.config, tokenizer)
        check_fit(config, tokenizer, self.architecture.config)
        data = prepare_rows(config, self.rows, tokenizer)
        base = self._load()
        whole: Any = gather_whole(base) if is_sharded(base) else base
        in_first(lambda: check_packed_model(config, whole, data))
        with explain_failed_writes(folder.path):
            in_first(lambda: folder.write_json(folder.data_report, report_data(config, self.rows, data)))
            choice = in_first(lambda: find_choice(base, data, config, folder))
        before = in_first(lambda: fingerprint(whole))
        whole = None  # of a sharded base it is a copy, which would stay while training
        with explain_failed_writes(folder.path):
            in_first(lambda: check_inputs(folder, {"weights of its base": before.combined_sha256}))
        num_numbers = sum(parameter.numel() for parameter in base.parameters())
        prepared = prepare_model(base, config, choice)
        is_patch = isinstance(config.method, ExpertsMethod)
        numbers = {"trained": outcome.count_trained(prepared.model), "model": num_numbers}
        evidence = _Evidence(before, hash_base(base, prepared.trained) if is_patch else {}, numbers)
        self.say(
            f"Training {numbers['trained']:,} of {numbers['model']:,} numbers by {config.method.NAME} on "
            f"{data.report.train.tokens:,} tokens in {len(data.train):,} rows"
        )
        session = train(prepared, config, data, folder)
        if session.is_interrupted:
            self.say(f"Interrupted. A checkpoint is in {folder.checkpoints}; the same command goes on from there.")
            raise KeyboardInterrupt
        if is_sharded(prepared.model):
            prepared = replace(prepared, model=gather_whole(prepared.model))
        in_first(lambda: self._finish(prepared, session, data, tokenizer, evidence))
        wait_for_all()
        return self._read_result()

    def _read_result(self) -> RunResult:
        folder = self.folder
        report, changes = folder.read_json(folder.report), folder.read_json(folder.changes)
        return RunResult(folder.path, folder.result(self.config.method.NAME), report, changes)

    def _settle_threads(self) -> None:
        """Another number of threads rounds differently, and a resumed run shall end the same."""
        file = self.folder.num_threads
        if file.exists():
            torch.set_num_threads(int(file.read_text("utf-8")))
        elif is_first():
            with explain_failed_writes(self.folder.path):
                write_atomically(file, lambda path: path.write_text(str(torch.get_num_threads()), "utf-8"))

    def _load(self) -> PreTrainedModel:
        config, architecture = self.config, self.architecture
        if isinstance(config.method, PretrainMethod):
            if config.training.is_sharded:
                scratch = scratch_folder(self.folder.checkpoints) / "start"
                with explain_failed_writes(self.folder.path):
                    return build_sharded(self._build, config.training, scratch=scratch)
            return self._build().to(device())
        if config.training.is_sharded:
            return load_base_sharded(config.model, config.training, revision=architecture.revision)
        return load_base(config.model, revision=architecture.revision).to(device())

    def _build(self) -> PreTrainedModel:
        return build_model(self.architecture.config, seed=self.config.training.seed)

    def _finish(
        self,
        prepared: Prepared,
        session: Session,
        data: PreparedData,
        tokenizer: Any,
        evidence: "_Evidence",
    ) -> None:
        """Prove what was trained, then write the result, the pictures and, last, the report."""
        config, folder = self.config, self.folder
        figures = self._figures(session, data, prepared) | {"numbers": evidence.numbers}
        outcome.check_finite(prepared.model)
        adapter = outcome.count_adapter(prepared.model) if isinstance(config.method, LoraMethod) else None
        with explain_failed_writes(folder.path):
            if adapter is not None:
                outcome.save_adapter(prepared.model, folder, config)
            base = make_whole(prepared)
            table = compare_fingerprints(evidence.before, fingerprint(base), trained=prepared.trained)
            folder.write_json(folder.changes, outcome.describe_changes(table, adapter))
            try:
                table.check()
            except HubMoeError:
                remove(folder.result(config.method.NAME))
                raise
            self._draw(session, data)
            if isinstance(config.method, ExpertsMethod):
                outcome.save_patch(base, folder, config, hashes=evidence.hashes, figures=figures, tokenizer=tokenizer)
            elif adapter is None:
                outcome.save_model(base, folder, tokenizer=tokenizer)
            report = {**figures, "changes": table.totals(), "wall_s": round(time.monotonic() - self.started_s, 1)}
            folder.write_json(folder.report, report)

    def _figures(self, session: Session, data: PreparedData, prepared: Prepared) -> dict[str, Any]:
        model: Any = prepared.model
        experts = describe_for_record(model.config._experts_implementation, str(device()), model.dtype)
        return {
            "method": self.config.method.NAME,
            "model": {
                "name": self.config.model.name or self.config.model.preset,
                "revision": self.config.model.revision,
            },
            "data": data.report.provenance.to_dict(),
            "steps": session.step,
            "resumed_at_step": session.first_step or None,
            "tokens": session.tokens,
            "tokens_per_s": round(session.tokens_per_s, 1),
            "held_out_loss": {"before": session.held_out[0][1], "after": session.held_out[-1][1]},
            "training_loss": {"first": session.losses[0], "last": session.losses[-1]},
            "balancing_speed": prepared.balancing_speed,
            "processes": count(),
            "torch_threads": torch.get_num_threads(),
            "energy_kwh": session.energy and session.energy.kwh,
            "energy": session.energy and session.energy.to_dict(),
            "peak_memory_bytes": outcome.peak_memory_bytes(),
            "versions": describe_versions() | experts,
        }

    def _draw(self, session: Session, data: PreparedData) -> None:
        try:
            from ..plots import plot_expert_load, plot_loss_curve  # needs an extra
        except MissingExtraError as error:
            self.say(f"No pictures: {error}")
            return
        tokens_per_step = max(1, session.tokens // max(1, session.step))
        title = f"Loss on {data.report.provenance.source}"
        curve = plot_loss_curve(session.losses, session.held_out, tokens_per_step=tokens_per_step, title=title)
        write_atomically(self.folder.loss_curve, lambda path: curve.savefig(path, format="png"))
        if session.load:
            layers = next(iter(session.load.values()))
            load = plot_expert_load(
                [(f"{phase} of training", _relative(loads)) for phase, loads in session.load.items()],
                layer_indices=list(layers),
                title="Tokens per expert",
            )
            write_atomically(self.folder.expert_load, lambda path: load.savefig(path, format="png"))


def _relative(loads: Mapping[int, list[int]]) -> list[list[float]]:
    """Loads of layers, each over its mean."""
    return [[count * len(load) / max(1, sum(load)) for count in load] for load in loads.values()]


@dataclass(frozen=True)
class _Evidence:
    """Of the base before training: fingerprint, hashes of what a patch would replace, how many numbers are trained."""

    before: Fingerprint
    hashes: Mapping[str, Mapping[str, str]]
    numbers: Mapping[str, int]
