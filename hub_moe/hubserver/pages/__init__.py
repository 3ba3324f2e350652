"""Pages for people, at the same address as the API: plain HTML, no script, readable in any browser."""

from . import files, history, lists, login, repo, talk

PAGES = [one for module in (login, lists, files, history, talk, repo) for one in module.ROUTES]
