"""Records: the evidence of one evaluation run, a JSON file named by its own hash beside a table of every answer.

Imports neither torch nor lm_eval: cards, pull requests and pages are rendered from records.
"""

from .record import (
    DatasetSource,
    EntryResult,
    Execution,
    Metric,
    ModelSource,
    NoiseFloor,
    Record,
    SampleFile,
    SuiteSource,
    TaskSource,
)
from .samples import Sample, read_samples
from .store import StoredRecord, find_records, is_record_name, read_record, write_record

__all__ = [
    "DatasetSource",
    "EntryResult",
    "Execution",
    "Metric",
    "ModelSource",
    "NoiseFloor",
    "Record",
    "Sample",
    "SampleFile",
    "StoredRecord",
    "SuiteSource",
    "TaskSource",
    "find_records",
    "is_record_name",
    "read_record",
    "read_samples",
    "write_record",
]
