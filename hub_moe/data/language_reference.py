"""A second real text that is on every machine, of another kind than source code: Python's language reference."""

from ..errors import DatasetError
from .source_corpus import Document


def read_language_reference() -> tuple[Document, ...]:
    """What `help("TOPIC")` shows in the running Python: English prose about the language, one document a topic.

    Raises:
        DatasetError: If this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DatasetError(
            "This Python lacks pydoc_data, the text of its own help(); use one with the whole standard library."
        ) from error
    return tuple(Document(name, topics[name]) for name in sorted(topics))
