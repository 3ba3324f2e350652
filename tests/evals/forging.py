"""What a cheat does to a record: anything, with every hash and every sum computed again, so that it looks whole."""

import json
import random
from dataclasses import replace

from hub_moe.evals.claim_checks import answer_from_samples
from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.records import Record, read_record, write_record
from hub_moe.evals.run import RunFacts, evaluate_suite, summarise_entries
from hub_moe.evals.scoring import score_task
from hub_moe.evals.suites import Suite, load_suite
from hub_moe.evals.tasks import build_suite
from hub_moe.evals.verify import Reviewer, verify_record

from .checkpoints import TASKS

ALL = 10**6  # more documents than there are


class Forger:
    """A record and its samples, to be changed at will and written as if a run had made them."""

    def __init__(self, path):
        stored = read_record(path)
        self.record, self.samples = stored.record, stored.read_samples()

    def change(self, **fields):
        self.record = replace(self.record, **fields)
        return self

    def change_entry(self, name, **fields):
        entries = [replace(e, **fields) if e.name == name else e for e in self.record.entries]
        return self.change(entries=tuple(entries))

    def change_metric(self, entry, metric, **fields):
        metrics = self.record.entry(entry).metrics
        return self.change_entry(entry, metrics=tuple(replace(m, **fields) if m.name == metric else m for m in metrics))

    def change_task(self, entry, **fields):
        task = self.record.entry(entry).tasks[0]
        return self.change_entry(entry, tasks=(replace(task, **fields),))

    def change_samples(self, change, *, where=lambda sample: True):
        """Replace samples by what `change` makes of them: a sample, None to drop it, or several."""
        found = []
        for sample in self.samples:
            made = change(sample) if where(sample) else sample
            found += made if isinstance(made, list) else [made] if made is not None else []
        self.samples = found
        return self

    def settle(self):
        """Compute every score and metric again, as the checks do."""
        built = build_suite(Suite.from_declaration(self.record.suite.declaration))
        answer_from_samples(built, {(s.entry, s.task, s.index): s for s in self.samples})
        scored = [score_task(each) for each in built.tasks]
        self.samples = [sample for each in scored for sample in each.samples]
        return self.change(entries=summarise_entries(built, scored))

    def write(self, folder):
        """The path of the record, whose hashes are all right."""
        return write_record(folder, self.record, self.samples).path


def write_json(folder, data):
    """A record from plain JSON, whatever it holds, with the id that its content has if it has one."""
    fields = {key: value for key, value in data.items() if key != "id"}
    try:
        fields = {"id": Record.from_dict({**fields, "id": None}).id, **fields}
    except ValueError as error:
        found = str(error).partition("has the hash ")[2].partition(",")[0]
        fields = {"id": found or "0" * 64, **fields}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"offline-{fields['id'][:16]}.json"
    path.write_text(json.dumps(fields), "utf-8")
    return path


def fabricate(samples, share, seed=0):
    """The places of so large a share of the samples."""
    return set(random.Random(seed).sample(range(len(samples)), round(share * len(samples))))


def record_of(model):
    (path,) = (model / "evals").glob("*.json")
    return path


def verify(path, model, *, documents=0, **reviewer):
    return verify_record(path, Reviewer(model=str(model), num_documents=documents, **reviewer))


def failures(verification):
    """The findings that did not hold, by check."""
    assert (verification.outcome == "failed") == (not all(f.passed for f in verification.findings))
    return {finding.check: finding.detail for finding in verification.findings if not finding.passed}


def evaluate_other(model, folder, **changes):
    """The record of a suite that differs from the honest one."""
    loaded = load_model(ModelRequest(str(model), batch_size=4))
    suite = replace(load_suite("offline", limit=4, tasks=TASKS), **changes)
    return evaluate_suite(loaded, build_suite(suite, tokenizer=loaded.tokenizer), folder, RunFacts(["test"]))
