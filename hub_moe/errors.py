"""Every exception hub_moe raises on purpose. Each is also the built-in that a caller would catch."""


class HubMoeError(Exception):
    """Base of every error hub_moe raises on purpose; its message is one sentence for the user."""


class ConfigError(HubMoeError, ValueError):
    """A configuration value is unknown, missing or inconsistent with another."""


class CheckpointError(HubMoeError, OSError):
    """A checkpoint is damaged, unsafe, or its tensors do not match its configuration."""


class UnsupportedModelError(HubMoeError, ValueError):
    """A model type that this command or class does not know."""


class PatchError(HubMoeError, ValueError):
    """An expert patch does not fit the model, such as one made for another base, or the model carries none."""


class ConflictError(PatchError):
    """Two patches change the same tensors, or a newer base changed what a patch changes.

    `tensors` are the names of all of them.
    """

    def __init__(self, message: str, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


class GenerationError(HubMoeError, ValueError):
    """A generation setting that this model cannot serve."""


class EvaluationError(HubMoeError, ValueError):
    """Scores that cannot be summarised or compared, such as those of two models on different documents or prompts."""


class DatasetError(HubMoeError, ValueError):
    """A text or dataset lacks what the task needs."""


class DivergenceError(HubMoeError, ArithmeticError):
    """Training reached a loss, gradient or weight that is not finite."""


class MissingExtraError(HubMoeError, ImportError):
    """An optional dependency is not installed; the message gives the pip command."""


class HubError(HubMoeError, OSError):
    """A Hub cannot be reached, refused, or gave back something else than was sent."""


class TrainingProofError(HubMoeError, RuntimeError):
    """Weights changed that were to stay frozen, or what was trained cannot be proved."""
