"""`hub-moe hub`: run the embedded Hub and look after it."""

import sys
from typing import Annotated

import typer

from .hub_storage import DEFAULT_ROOT, AsJson, Root, backup, check, gc, restore
from .mirror import mirror
from .output import print_json, print_table, print_text, say

hub = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run the embedded Hub and look after it.")
user = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="People and organisations of the embedded Hub.")
token = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tokens by which clients log in.")
hub.add_typer(user, name="user")
hub.add_typer(token, name="token")
for _command in (check, gc, backup, restore, mirror):
    hub.command()(_command)


@hub.command()
def serve(
    root: Root = DEFAULT_ROOT,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 7860,
    host: Annotated[str, typer.Option(help="Who can reach it; 127.0.0.1 is this machine only.")] = "127.0.0.1",
) -> None:
    """Serve a Hub from one folder until Ctrl-C.

    Prints the line that points the Hugging Face clients at it. On its first start it makes a user `admin` and shows a
    token; `admin` is a user like any other. Who may enter the folder is who keeps the Hub.

    \b
    Examples:
      hub-moe hub serve
      hub-moe hub serve --root lab-hub --port 8080
    """
    from ..hubserver.serve import serve as run_server

    def announce(address: str) -> None:
        if host not in {"127.0.0.1", "::1", "localhost"}:
            say(f"Anybody who reaches {host} can read the public repos; tokens travel unencrypted.")
        say(f"Pages for people are at the same address: {address}")
        print(f"export HF_ENDPOINT={address}", flush=True)

    run_server(root, host=host, port=port, on_ready=announce, on_first_start=_announce_token)


def _announce_token(token: str) -> None:
    say(f"A token of the new user admin, shown only now:\nexport HF_TOKEN={token}")


@user.command("add")
def add_user(
    name: Annotated[str, typer.Argument(help="Letters, digits, '-', '_' and '.'.")],
    root: Root = DEFAULT_ROOT,
    org: Annotated[bool, typer.Option("--org", help="Make an organisation instead.")] = False,
    member: Annotated[
        list[str] | None, typer.Option(metavar="USER", help="A member of the organisation; may be repeated.")
    ] = None,
) -> None:
    """Add a user and show a token that may write, or add an organisation.

    \b
    Examples:
      hub-moe hub user add alice
      hub-moe hub user add lab --org --member alice --member bob
    """
    from ..hubserver.store import Store

    with Store(root) as store:
        store.accounts.add_user(name, kind="org" if org else "user", members=member or [])
        if not org:
            print_text(store.accounts.create_token(name))


@user.command("join")
def join_org(
    name: Annotated[str, typer.Argument(metavar="USER", help="Who joins.")],
    org: Annotated[str, typer.Argument(help="Which organisation.")],
    root: Root = DEFAULT_ROOT,
    role: Annotated[str, typer.Option(help="admin, write or read; replaces an earlier one.")] = "write",
) -> None:
    """Make a user a member of an organisation.

    \b
    Examples:
      hub-moe hub user join carol lab --role read
    """
    from ..hubserver.store import Store

    with Store(root, create=False) as store:
        store.accounts.add_member(org, name, role=role)
    say(f"{name} is a member of {org} and may {role}.")


@user.command("leave")
def leave_org(
    name: Annotated[str, typer.Argument(metavar="USER", help="Who leaves.")],
    org: Annotated[str, typer.Argument(help="Which organisation.")],
    root: Root = DEFAULT_ROOT,
) -> None:
    """Take a user out of an organisation, at once; revoke no token: the user keeps what is their own.

    \b
    Examples:
      hub-moe hub user leave carol lab
    """
    from ..hubserver.store import Store

    with Store(root, create=False) as store:
        store.accounts.remove_member(org, name)
    say(f"{name} is no member of {org} any more.")


@user.command("remove")
def remove_user(
    name: Annotated[str, typer.Argument(help="A user or an organisation.")],
    root: Root = DEFAULT_ROOT,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a user or an organisation that has no repos; all tokens of a user become worthless at once.

    Commits and comments keep the name, and whoever is added under it later is taken for their author.

    \b
    Examples:
      hub-moe hub user remove carol
    """
    from ..hubserver.store import Store

    if not (yes or sys.stdin.isatty()):
        raise typer.BadParameter("Without a terminal to ask at, this needs --yes.")
    with Store(root, create=False) as store:
        name = store.accounts.find(name)["name"]
        if not yes:
            typer.confirm(f"Remove {name}?", abort=True, err=True)
        store.accounts.remove(name)
    say(f"{name} is removed.")


@user.command("list")
def list_users(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show who is on this Hub.

    \b
    Examples:
      hub-moe hub user list --root lab-hub
    """
    from ..hubserver.store import Store

    with Store(root, create=False) as store:
        _print_rows(store.accounts.list_all(), ("name", "kind", "created_at"), as_json=as_json)


@token.command("list")
def list_tokens(
    user_name: Annotated[str, typer.Argument(metavar="USER", help="Whose tokens.")],
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show a user's tokens by name; a token itself is shown only when it is made.

    \b
    Examples:
      hub-moe hub token list alice
    """
    from ..hubserver.store import Store

    with Store(root, create=False) as store:
        _print_rows(store.accounts.tokens(user_name), ("name", "role", "created_at"), as_json=as_json)


@token.command("create")
def create_token(
    user_name: Annotated[str, typer.Argument(metavar="USER", help="Whose token.")],
    root: Root = DEFAULT_ROOT,
    name: Annotated[str | None, typer.Option(help="What it is for; a free name is chosen without it.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Make an earlier one of this name worthless.")] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="The token cannot change anything.")] = False,
) -> None:
    """Show a new token; it is stored only as a hash.

    \b
    Examples:
      export HF_TOKEN=$(hub-moe hub token create alice --name laptop)
    """
    from ..hubserver.store import Store

    with Store(root, create=False) as store:
        print_text(
            store.accounts.create_token(user_name, name=name, role="read" if read_only else "write", replace=replace)
        )


@token.command("revoke")
def revoke_token(
    user_name: Annotated[str, typer.Argument(metavar="USER", help="Whose token.")],
    root: Root = DEFAULT_ROOT,
    name: Annotated[str, typer.Option(help="Which token.")] = "default",
) -> None:
    """Make a token worthless at once.

    \b
    Examples:
      hub-moe hub token revoke alice --name laptop
    """
    from ..hubserver.store import Store

    with Store(root, create=False) as store:
        store.accounts.revoke_token(user_name, name)
    say(f"Revoked the token {name!r} of {user_name}.")


def _print_rows(rows: list[dict[str, str]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table([column.removesuffix("_at") for column in columns], [[row[key] for key in columns] for row in rows])
