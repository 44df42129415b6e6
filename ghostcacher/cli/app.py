"""Commands on a directory of blocks. None of these imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from ghostcacher.cli import upkeep
from ghostcacher.cli.output import Format, emit, fail, table
from ghostcacher.config import default_directory
from ghostcacher.errors import GhostcacherError
from ghostcacher.keyring import read_keyring, write_key
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import Sealing
from ghostcacher.stores.sealed import SealedDirectory
from ghostcacher.units import format_bytes, parse_bytes, parse_duration

PROBLEMS = 1
SHORT_DIGITS = 12

app = typer.Typer(
    name="ghostcacher",
    help="Look after the blocks that ghostcacher stored, and see what it does for a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Directory = Annotated[Path | None, typer.Option("--directory", "-d", help="The store; default: $GHOSTCACHER_HOME.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="Of a sealed store; default: $GHOSTCACHER_KEY_FILE, $GHOSTCACHER_KEY.")
]
Output = Annotated[Format, typer.Option("--format", "-f", help="What to print.")]


def run() -> None:
    """Run the application; errors of ours end it with exit code 2 and one sentence."""
    from ghostcacher.cli import bench, calibrate, demo, models

    models.register(app)
    demo.register(app)
    bench.register(app)
    calibrate.register(app)
    try:
        app()
    except GhostcacherError as error:
        fail(str(error))


@app.command("ls")
def ls(directory: Directory = None, key_file: KeyFile = None, output: Output = Format.human) -> None:
    """List namespaces: one per set of weights, configuration and salt."""
    found = upkeep.summaries(_opened(directory, key_file))
    rows: list[list[object]] = [
        [s.namespace[:SHORT_DIGITS], s.model, s.codec, s.blocks, format_bytes(s.size_bytes), _age(s.used_at_seconds)]
        for s in found
    ]
    emit(output, {"namespaces": found}, table(["namespace", "model", "codec", "blocks", "size", "used"], rows))


@app.command()
def stats(directory: Directory = None, key_file: KeyFile = None, output: Output = Format.human) -> None:
    """Print totals of the store."""
    store = _opened(directory, key_file)
    found = upkeep.summaries(store)
    size_bytes = sum(s.size_bytes for s in found)
    totals = {
        "directory": str(store.root), "namespaces": len(found), "blocks": sum(s.blocks for s in found),
        "size_bytes": size_bytes,
    }  # fmt: skip
    human = f"{totals['blocks']:,} blocks in {len(found)} namespaces, {format_bytes(size_bytes)}, in {store.root}"
    emit(output, totals, human)


@app.command()
def verify(
    directory: Directory = None,
    key_file: KeyFile = None,
    output: Output = Format.human,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what does not verify.")] = False,
) -> None:
    """Read every block and check name, header, key and digest. Exit code 1 if any is unsound."""
    store = _opened(directory, key_file)
    entries = list(store.list_keys(timeout_seconds=60.0))
    with tqdm(
        total=sum(entry.size_bytes for entry in entries), unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        looked = list(upkeep.unsound(store, entries, lambda size_bytes: _advance(bar, size_bytes)))
    bad = [found for found in looked if found.reason != upkeep.SEALED]
    if delete:
        upkeep.delete(store, bad)
    lines = [f"{found.key}: {found.reason}" for found in bad]
    done = ", deleted" if delete and bad else ""
    closed = sum(found.reason == upkeep.SEALED for found in looked)
    sealed = f", {closed:,} sealed and not checked: give --key-file" if closed else ""
    emit(
        output,
        {"checked": len(entries) - closed, "sealed": closed, "unsound": bad, "deleted": len(bad) if delete else 0},
        "\n".join([*lines, f"{len(entries) - closed:,} blocks checked, {len(bad)} unsound{done}{sealed}"]),
    )
    if bad:
        raise typer.Exit(PROBLEMS)


@app.command()
def prune(
    directory: Directory = None,
    key_file: KeyFile = None,
    output: Output = Format.human,
    older_than: Annotated[str | None, typer.Option(help="Remove what was not used for so long, such as 7d.")] = None,
    to: Annotated[
        str | None, typer.Option(help="Remove the least recently used until so much is left, such as 10GiB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove blocks by age or down to a size, children before parents."""
    if (older_than is None) == (to is None):
        fail("prune needs exactly one of --older-than 7d and --to 10GiB")
    store = _opened(directory, key_file)
    with tqdm(unit=" blocks", disable=None, leave=False) as bar:
        if older_than is not None:
            plan = upkeep.plan_older_than(store, parse_duration(older_than), lambda count: _advance(bar, count))
        else:
            plan = upkeep.plan_down_to(store, parse_bytes(to or ""), lambda count: _advance(bar, count))
    _carry_out(plan, store, output, dry_run=dry_run)


@app.command()
def rm(
    namespace: Annotated[str, typer.Argument(help="As ls prints it: the first digits are enough.")],
    directory: Directory = None,
    key_file: KeyFile = None,
    output: Output = Format.human,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove a namespace."""
    store = _opened(directory, key_file)
    found = [name for name in store.namespaces() if name.startswith(namespace.lower())]
    if len(found) != 1 or not namespace:
        fail(f"{len(found)} namespaces begin with {namespace!r}; `ghostcacher ls` prints them")
    _carry_out(upkeep.plan_namespace(store, found[0]), store, output, dry_run=dry_run)


@app.command("new-key")
def new_key(path: Annotated[Path, typer.Argument(help="A file that does not stand yet.")]) -> None:
    """Make a key file for open_store(key=…), which only its user may read."""
    write_key(path)
    emit(Format.human, None, f"wrote a new key to {path}; whoever has it can read and forge what it seals")


def _carry_out(plan: upkeep.RemovalPlan, store: upkeep.Directory, output: Format, *, dry_run: bool) -> None:
    if not dry_run:
        plan.execute(store)
    left = f"; {plan.sealed:,} sealed ones left: give --key-file" if plan.sealed else ""
    verb = "would remove" if dry_run else "removed"
    emit(
        output,
        {"blocks": len(plan.entries), "size_bytes": plan.size_bytes, "sealed": plan.sealed, "dry_run": dry_run},
        f"{verb} {len(plan.entries):,} blocks, {format_bytes(plan.size_bytes)}{left}",
    )


def _opened(directory: Path | None, key_file: Path | None) -> upkeep.Directory:
    root = directory if directory is not None else default_directory()
    if not root.is_dir():
        fail(f"there is no store in {root}; give another with --directory")
    secrets = read_keyring(key_file)
    store = DirectoryStore(root, is_sealed=bool(secrets))
    return SealedDirectory(store, [Sealing.of(secret) for secret in secrets]) if secrets else store


def _age(used_at_seconds: float) -> str:
    import time

    from ghostcacher.units import format_seconds

    return f"{format_seconds(max(0.0, time.time() - used_at_seconds))} ago"


def _advance(bar: Any, amount: int) -> None:
    bar.update(amount)


if __name__ == "__main__":
    run()
