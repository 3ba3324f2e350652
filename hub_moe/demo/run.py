"""The demo as a program over the library, step by step."""

import gzip
import lzma
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..anatomy import measure_footprint
from ..bars import quiet_bars
from ..cards.facts import DatasetFacts
from ..data import Corpus, Document, pack_documents, read_stdlib_corpus, train_bpe_tokenizer
from ..environment import describe_versions
from ..errors import CheckpointError
from ..evals import CodeLength, score_with_compressor, score_with_model, score_with_unigrams
from ..modeling import HubMoeConfig, HubMoeForCausalLM
from ..plots import plot_expert_load, plot_loss_curve
from ..training import TrainingRecord, TrainingSession, measure_imbalance, read_record, train_causal_lm
from ..training.checkpoints import explain_failed_writes
from ..training.threads import choose_num_threads
from .card import TrainedModel, write_card
from .evidence import evaluate_base, evaluate_patch, verify_patch
from .folder import RunFolder, open_run_folder
from .local_hub import DATASET, MODEL, PATCH, LocalHub, open_local_hub
from .plan import DemoPlan, plan_demo
from .report import DemoReport
from .tuning import describe_patch, draw_choice, patched, publish_patch, tune_experts
from .visitor import hash_logits


def run_demo(
    output_dir: str | Path, *, minutes: float = 3.0, seed: int = 0, fresh: bool = False, plan: DemoPlan | None = None
) -> DemoReport:
    """Train, evaluate, publish, reload and report a small model; `output_dir` then holds `model` and the report.

    Dataset and model go through an embedded Hub in `output_dir/hub`, by the ordinary clients.

    An interrupted run goes on where it stopped when called again with the same arguments, and ends as if it had never
    been interrupted; a finished one is only read.

    Args:
        output_dir: A new or empty folder, or that of an earlier run.
        minutes: Rough length of the training on two cores; it fixes the number of steps.
        seed: Of the split, the weights and the batches.
        fresh: Remove an earlier run in `output_dir` first.
        plan: Every number at once, in place of `minutes` and `seed`.

    Raises:
        ConfigError: If `output_dir` holds something else, or a run with other settings.
        CheckpointError: If `output_dir` cannot be written.
        HubError: If a client fails at the Hub.
        MissingExtraError: If the extra `server` is not installed.
        KeyboardInterrupt: After Ctrl-C; once training has begun it leaves a checkpoint.
    """
    with quiet_bars():
        return _run(Path(output_dir), plan or plan_demo(minutes=minutes, seed=seed), fresh=fresh)


def _run(output_dir: Path, plan: DemoPlan, *, fresh: bool) -> DemoReport:
    started_s = time.monotonic()
    corpus = read_stdlib_corpus(seed=plan.seed, held_out_share=plan.held_out_share, max_bytes=plan.corpus_bytes)
    settings = {"plan": asdict(plan), "corpus_sha256": corpus.sha256}
    folder = open_run_folder(output_dir, settings, fresh=fresh)
    if folder.is_finished:
        _say(f"{folder.path} holds this run, finished; --fresh starts it anew.")
        return DemoReport.read(folder.report)
    with open_local_hub(folder.hub, scratch=folder.scratch) as hub:
        built = _build(hub, plan, corpus, folder)
        base = _share_base(hub, plan, built, folder)
        contributed = _contribute(hub, plan, built, base, folder)
        with explain_failed_writes(folder.path):
            report = DemoReport(
                **built.facts,
                dataset={"repo": DATASET, "revision": built.dataset_revision},
                model=base.published,
                **contributed,
                prompt=plan.prompt,
                completion=base.completion,
                seed=plan.seed,
                wall_s=round(time.monotonic() - started_s, 1),
            )
            folder.write_atomically(folder.report, report.write)
    return report


@dataclass(frozen=True)
class _Built:
    """A trained model, on disk too, and what the report says about it."""

    model: PreTrainedModel
    dataset_revision: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Base:
    """The published model: `repo` and `revision`, its record, and what it completed for a stranger."""

    published: dict[str, str]
    record: Path
    completion: str


def _build(hub: LocalHub, plan: DemoPlan, corpus: Corpus, folder: RunFolder) -> _Built:
    """Text through the Hub, tokenizer, training, scores, and the folder that will be published."""
    _say(f"Sending {len(corpus.train) + len(corpus.held_out)} files through the Hub at {hub.hub.url} as {DATASET}")
    with explain_failed_writes(folder.path):
        corpus, dataset_revision = hub.send_corpus(corpus)
    _say(f"Learning a tokenizer from {len(corpus.train)} files of Python's own library")
    tokenizer = train_bpe_tokenizer((document.text for document in corpus.train), vocab_size=plan.vocab_size)
    tokens = Tokens(_tokenize(corpus.train, tokenizer), _tokenize(corpus.held_out, tokenizer))
    session = _train(plan, tokenizer, tokens, folder)
    if session.is_interrupted:
        _say(f"Interrupted. A checkpoint is in {folder.checkpoints}; the same command goes on from there.")
        raise KeyboardInterrupt
    model = AutoModelForCausalLM.from_pretrained(session.checkpoint).eval()
    _say(f"Scoring {len(corpus.held_out)} files that were held out")
    scores = _score(plan, model, corpus, tokens, separator=tokenizer.bos_token_id)
    record = read_record(session.checkpoint)
    facts: dict[str, Any] = {
        "plan": asdict(plan),
        "config": model.config.to_dict(),
        "parameters": _count_parameters(model.config),
        "corpus": _describe_corpus(corpus, tokens),
        "training": _describe_training(plan, record, session),
        "bits_per_byte": {name: score.bits_per_byte for name, score in scores.items()},
        "held_out": _describe_scoring(plan, scores["model"]),
        "load_imbalance": _describe_imbalance(record),
        "versions": describe_versions(),
    }
    built = _Built(model, dataset_revision, facts)
    with explain_failed_writes(folder.path):
        _draw(plan, record, folder)
        _save(model, tokenizer, _describe_trained(built, record), plan, folder)
    return built


def _describe_trained(built: _Built, record: TrainingRecord) -> TrainedModel:
    return TrainedModel(
        name=MODEL,
        footprint=measure_footprint(built.model.config),
        dataset=_describe_dataset(built.facts["corpus"]["train"], revision=built.dataset_revision),
        steps=record.step,
        load=dict(zip(record.layer_indices, _load_by_phase(record)["last tenth"], strict=True)),
        bits_per_byte=built.facts["bits_per_byte"],
        versions=built.facts["versions"],
    )


def _share_base(hub: LocalHub, plan: DemoPlan, built: _Built, folder: RunFolder) -> _Base:
    _say(f"Evaluating it by the suite {plan.suite}")
    record = evaluate_base(hub, plan, folder)
    _say(f"Publishing {MODEL}, loading it back by its name, completing")
    with explain_failed_writes(folder.path):
        published = _publish(hub, plan, built.model, folder)
    return _Base(published["model"], record, published["completion"])


def _contribute(hub: LocalHub, plan: DemoPlan, built: _Built, base: _Base, folder: RunFolder) -> dict[str, Any]:
    """A contributor's patch, what it gains and costs, and what a stranger says of these claims."""
    _say("A contributor trains the experts that English prose uses most, on Python's language reference")
    revision = base.published["revision"]
    tuned = tune_experts(hub, plan, folder, base_revision=revision)
    _say(f"Evaluating them against the base by the suite {plan.suite}")
    comparison = evaluate_patch(hub, plan, folder, base_record=base.record, base_revision=revision)
    _say(f"Publishing them as {PATCH}, loading that by its name")
    with explain_failed_writes(folder.path):
        draw_choice(folder)
        with patched(built.model, tuned):
            patch = publish_patch(hub, tuned, built.model)
    _say(f"A stranger checks the claims of {PATCH}")
    verification = verify_patch(hub, plan)
    return {
        "patch": patch | describe_patch(tuned, folder.model),
        "comparison": comparison,
        "verification": verification,
    }


@dataclass(frozen=True)
class Tokens:
    """Token ids of each document."""

    train: list[list[int]]
    held_out: list[list[int]]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tokenize(documents: tuple[Document, ...], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    ids: list[list[int]] = tokenizer([document.text for document in documents])["input_ids"]
    return ids


def _train(plan: DemoPlan, tokenizer: PreTrainedTokenizerFast, tokens: Tokens, folder: RunFolder) -> TrainingSession:
    config = HubMoeConfig.from_preset("nano", vocab_size=len(tokenizer), **plan.model_changes)
    torch.manual_seed(plan.seed)
    model = HubMoeForCausalLM(config)
    separator = tokenizer.bos_token_id
    train_blocks = pack_documents(tokens.train, block_length=plan.block_length, separator=separator)
    held_out_blocks = pack_documents(tokens.held_out, block_length=plan.block_length, separator=separator)
    spread = torch.linspace(0, len(held_out_blocks) - 1, min(plan.curve_blocks, len(held_out_blocks))).long()
    _say(
        f"Training a model of {model.num_parameters():,} parameters for {plan.training.steps} steps on "
        f"{train_blocks.numel():,} tokens"
    )
    num_threads = _settle_threads(model, train_blocks[: plan.training.batch_size], folder)
    _say(f"{num_threads} of torch's threads are the fastest here now")
    return train_causal_lm(
        model,
        tokenizer,
        train_blocks=train_blocks,
        held_out_blocks=held_out_blocks[spread],
        plan=plan.training,
        folder=folder.checkpoints,
    )


def _settle_threads(model: PreTrainedModel, blocks: torch.Tensor, folder: RunFolder) -> int:
    """Choose once for a run: another number of threads rounds differently, and a resumed run shall end the same."""
    if folder.num_threads.exists():
        num_threads = int(folder.num_threads.read_text("utf-8"))
        torch.set_num_threads(num_threads)
        return num_threads
    num_threads = choose_num_threads(model, blocks)
    folder.write_atomically(folder.num_threads, lambda path: path.write_text(str(num_threads), "utf-8"))
    return num_threads


def _score(
    plan: DemoPlan, model: PreTrainedModel, corpus: Corpus, tokens: Tokens, *, separator: int
) -> dict[str, CodeLength]:
    """Of the held-out files, under the model and what it has to beat."""
    texts = [document.text for document in corpus.held_out]
    size_bytes = sum(document.size_bytes for document in corpus.held_out)
    return {
        "model": _score_model(plan, model, corpus, tokens, separator=separator),
        "xz -9": score_with_compressor(lambda data: lzma.compress(data, preset=9), texts),
        "gzip -9": score_with_compressor(lambda data: gzip.compress(data, 9), texts),
        "unigram": score_with_unigrams(
            tokens.train, tokens.held_out, vocab_size=model.config.vocab_size, size_bytes=size_bytes
        ),
    }


def _score_model(
    plan: DemoPlan, model: PreTrainedModel, corpus: Corpus, tokens: Tokens, *, separator: int
) -> CodeLength:
    return score_with_model(
        model.eval(),
        tokens.held_out,
        size_bytes=sum(document.size_bytes for document in corpus.held_out),
        separator=separator,
        context_length=plan.block_length,
        stride=plan.block_length // 2,
    )


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    trained: TrainedModel,
    plan: DemoPlan,
    folder: RunFolder,
) -> None:
    """Everything that is published: weights, tokenizer, card, pictures."""

    def save(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        for picture in (folder.loss_curve, folder.expert_load):
            shutil.copy(picture, path)
        write_card(trained, plan, folder=path)

    folder.write_atomically(folder.model, save)


def _publish(hub: LocalHub, plan: DemoPlan, model: PreTrainedModel, folder: RunFolder) -> dict[str, Any]:
    """Publish the model, and let somebody else load it by its name.

    Raises:
        CheckpointError: If what they load computes other logits.
    """
    revision = hub.publish_model(folder.model)
    trial = hub.run_step(
        "try_model",
        user=None,
        repo=MODEL,
        revision=revision,
        num_threads=torch.get_num_threads(),
        seed=plan.seed,
        prompt=plan.prompt,
        completion_tokens=plan.completion_tokens,
    )
    if trial["logits_sha256"] != hash_logits(model):
        raise CheckpointError(
            f"{MODEL}, loaded from the Hub by its name, computes other logits than the trained model."
        )
    return {"model": {"repo": MODEL, "revision": revision}, "completion": trial["completion"]}


def _draw(plan: DemoPlan, record: TrainingRecord, folder: RunFolder) -> None:
    loss_curve = plot_loss_curve(
        record.losses,
        record.held_out,
        tokens_per_step=plan.training.batch_size * plan.block_length,
        title="Loss on Python's standard library",
    )
    load = _load_by_phase(record)
    expert_load = plot_expert_load(
        [
            (f"{phase} of training", (load_NE / load_NE.mean(-1, keepdim=True)).tolist())
            for phase, load_NE in load.items()
        ],
        layer_indices=record.layer_indices,
        title="Tokens per expert",
    )
    folder.write_atomically(folder.loss_curve, lambda path: loss_curve.savefig(path, format="png"))
    folder.write_atomically(folder.expert_load, lambda path: expert_load.savefig(path, format="png"))


def _load_by_phase(record: TrainingRecord) -> dict[str, torch.Tensor]:
    """Load of shape (layers, experts), float32, in the first and the last tenth of training."""
    history = torch.tensor(record.load_history, dtype=torch.float32)
    tenth = max(1, len(history) // 10)
    return {"first tenth": history[:tenth].sum(0), "last tenth": history[-tenth:].sum(0)}


def _count_parameters(config: HubMoeConfig) -> dict[str, int]:
    footprint = measure_footprint(config)
    return {"total": footprint.num_parameters, "active": footprint.num_active}


def _describe_corpus(corpus: Corpus, tokens: Tokens) -> dict[str, Any]:
    def describe(documents: tuple[Document, ...], ids: list[list[int]]) -> dict[str, int]:
        return {
            "files": len(documents),
            "bytes": sum(document.size_bytes for document in documents),
            "tokens": sum(map(len, ids)),
        }

    return {
        "source": "standard library of the running Python",
        "sha256": corpus.sha256,
        "train": describe(corpus.train, tokens.train),
        "held_out": {
            **describe(corpus.held_out, tokens.held_out),
            "names": [document.name for document in corpus.held_out],
        },
    }


def _describe_dataset(train: dict[str, int], *, revision: str) -> DatasetFacts:
    return DatasetFacts(
        DATASET, True, revision, split="train", rows=train["files"], tokens=train["tokens"], license="psf-2.0"
    )


def _describe_training(plan: DemoPlan, record: TrainingRecord, session: TrainingSession) -> dict[str, Any]:
    tokens_per_step = plan.training.batch_size * plan.block_length
    return {
        "steps": record.step,
        "tokens": record.step * tokens_per_step,
        "tokens_per_s": session.tokens_per_s,
        "torch_threads": torch.get_num_threads(),
        "resumed_at_step": session.first_step or None,
        "losses": [round(loss, 4) for loss in record.losses],
        "held_out_losses": [{"tokens": step * tokens_per_step, "loss": loss} for step, loss in record.held_out],
    }


def _describe_scoring(plan: DemoPlan, score: CodeLength) -> dict[str, Any]:
    return {
        "bytes": score.size_bytes,
        "tokens": score.tokens,
        "nats_per_token": score.nats_per_token,
        "context_length": plan.block_length,
        "stride": plan.block_length // 2,
        "baselines": "unigram: frequencies of the training tokens, add-one; gzip and xz: Python's modules at level 9, "
        "the held-out files end to end as one file, no training text",
    }


def _describe_imbalance(record: TrainingRecord) -> dict[str, dict[str, float]]:
    return {
        phase: {
            f"layer {index}": round(value, 4)
            for index, value in zip(record.layer_indices, measure_imbalance(load_NE).tolist(), strict=True)
        }
        for phase, load_NE in _load_by_phase(record).items()
    }
