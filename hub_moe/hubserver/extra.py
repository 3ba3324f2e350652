"""Importing this fails with the pip command when the packages of the extra `server` are not installed."""

from importlib.util import find_spec

from ..errors import MissingExtraError

_PACKAGES = ("blake3", "dulwich", "httptools", "jinja2", "lz4", "markdown_it", "nh3", "starlette", "uvicorn")

missing = [name for name in _PACKAGES if find_spec(name) is None]
if missing:
    raise MissingExtraError(f"The embedded Hub needs {', '.join(missing)}: pip install 'hub_moe[server]'.")
