"""A record and its samples, made by hand for the tests of what reads records."""

from hub_moe.evals.records import (
    DatasetSource,
    EntryResult,
    Execution,
    Metric,
    ModelSource,
    Record,
    Sample,
    SampleFile,
    SuiteSource,
    TaskSource,
)

NOT_WRITTEN = SampleFile("none.parquet", "", 0)


def make_record(**changes):
    """A record of one entry of four documents, two of them right."""
    task = TaskSource(
        name="cloze",
        output_type="multiple_choice",
        dataset=DatasetSource(path="json", split="test", num_rows=4, rows_sha256="1" * 64),
        config_sha256="2" * 64,
        prompts_sha256="3" * 64,
        num_documents=4,
    )
    metric = Metric("acc", 0.5, higher_is_better=True, num_documents=4, standard_error=0.29, low=0.1, high=0.9)
    values = {
        "suite": SuiteSource("offline", "4" * 64),
        "model": ModelSource("tiny", "checkpoint", files={"model.safetensors": "5" * 64}),
        "execution": Execution(engine="hub_moe", dtype="float32", experts="grouped_mm", batch_size=8),
        "entries": (EntryResult("cloze", (task,), (metric,), main_metric="acc"),),
        "samples": NOT_WRITTEN,
        "created": "2026-11-24T12:00:00Z",
        "command": ("hub-moe", "eval", "tiny", "--suite", "offline"),
        "seeds": {"fewshot": 1234},
        "versions": {"python": "3.13.0"},
        "wall_s": 3,
        "tokens": {"prompt": 100, "computed": 60, "generated": 0},
    }
    return Record(**{**values, **changes})


def make_samples(scores=(1.0, 0.0, 1.0, 0.0), **changes):
    """One sample for each score, of two choices each."""
    return [
        Sample(
            **{
                "entry": "cloze",
                "task": "cloze",
                "index": index,
                "document_sha256": f"{index:064x}",
                "prompt_sha256s": (f"{index:063x}a", f"{index:063x}b"),
                "log_likelihoods": (-1.5, -2.25),
                "is_greedy": (True, False),
                "scores": {"acc": score},
                **changes,
            }
        )
        for index, score in enumerate(scores)
    ]
