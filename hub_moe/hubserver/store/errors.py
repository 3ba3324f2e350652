"""What the store refuses. The HTTP side turns each class into one status; the store itself knows no HTTP."""

from ...errors import HubMoeError


class StoreError(HubMoeError):
    """Base of every refusal of the store; its message is one sentence for the client."""


class NotFoundError(StoreError, LookupError):
    """A repo, revision, entry, user or upload does not exist, or may not be seen."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what
        """`repo`, `revision`, `entry`, `user` or `upload`."""


class MovedError(NotFoundError):
    """A repo is not at this name any more; `target` (a RepoId) is where it is now, and who asks may see it there."""

    def __init__(self, message: str, target: object) -> None:
        super().__init__("repo", message)
        self.target = target


class InvalidInputError(StoreError, ValueError):
    """A name, path, operation or content that cannot be stored."""


class InvalidPathError(InvalidInputError):
    """A path that no file of a repo can have."""


class TooLargeError(InvalidInputError):
    """More bytes than a limit of this server allows."""


class ConflictError(StoreError, FileExistsError):
    """The thing exists already, or two changes cannot both be made."""


class StaleParentError(StoreError, RuntimeError):
    """The branch has moved on since the parent commit that the client named."""


class UnauthenticatedError(StoreError, PermissionError):
    """No token where one is needed, or a token that nobody has."""


class ForbiddenError(StoreError, PermissionError):
    """A known user who may not do this."""


class GatedError(ForbiddenError):
    """A gated repo whose owner has not granted this user access."""
