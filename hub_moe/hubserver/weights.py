"""What tensors the weights of a model hold, without sending the weights."""

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .cards import parse_object, read_object
from .profiles import read_weights_header
from .store import GitRepo
from .store.errors import InvalidInputError, NotFoundError

_MAX_INDEX_BYTES = 50_000_000
_MAX_SHARDS = 1000
_MAX_HEADERS_BYTES = 100_000_000


def show_metadata(call: Call) -> Response:
    """`GET /api/models/{id}/safetensors-metadata/{index}`: the index of `main`, and the header of every shard."""
    path = call.param("path")
    with call.store.repos.open(call.repo_to_read()) as git:
        commit = git.resolve("main")
        index = parse_object(_read(call, git, commit, path))
        weight_map = index.pop("weight_map", None)
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InvalidInputError(f"{path} is not an index of safetensors files: it has no weight_map.")
        folder = path.rpartition("/")[0]
        shards = sorted({*weight_map.values()})
        if len(shards) > _MAX_SHARDS:
            raise InvalidInputError(f"{path} names more than {_MAX_SHARDS} files.")
        headers: dict[str, object] = {}
        left_bytes = _MAX_HEADERS_BYTES
        for shard in shards:
            facts = call.store.files.find(git, commit, f"{folder}/{shard}".lstrip("/"))
            header = read_weights_header(call.store, git, facts) or b""
            left_bytes -= len(header)
            if left_bytes < 0:
                raise InvalidInputError(
                    f"The headers of the files in {path} have more than {_MAX_HEADERS_BYTES} bytes."
                )
            headers[shard] = _parse(header, shard)
    return JSONResponse({"index": index, "headers": headers})


def _read(call: Call, git: GitRepo, commit: str, path: str) -> bytes:
    facts = call.store.files.find(git, commit, path)
    if facts.size_bytes > _MAX_INDEX_BYTES:
        raise InvalidInputError(f"{path} is too large for an index of safetensors files.")
    return call.store.files.read(git, facts, limit_bytes=_MAX_INDEX_BYTES)


def _parse(header: bytes, shard: str) -> object:
    try:
        return read_object(header)
    except ValueError:
        raise NotFoundError("entry", f"{shard} is not a safetensors file.") from None


ROUTES = [route("/api/{kinds:model_kind}/{owner}/{name}/safetensors-metadata/{path:path}", show_metadata)]
