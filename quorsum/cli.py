"""The command line.

stdout carries the result only (a table, or one JSON object with ``--json``); everything else goes to stderr as
``quorsum: ...``. Exit status: 0 done, 1 checked and found bad, 2 could not tell, 64 wrong usage, 130 interrupted.

Heavy modules are imported inside the commands, so that ``quorsum --help`` is instant.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console

from quorsum import __version__
from quorsum.errors import DataError, QuorsumError, UsageError

if TYPE_CHECKING:
    from quorsum.server.records import RoundRecord
    from quorsum.simulation.run import Result, Simulation

__all__ = ["main"]

EXIT_OK, EXIT_BAD, EXIT_UNKNOWN, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 64, 130

# Commands that live with the coordinator and with the site: module, name in it, help. Loaded when they are typed.
ROOMS = {
    "coordinator": ("quorsum.server.commands", "coordinator", "Run the coordinator of a federation."),
    "run": ("quorsum.server.commands", "run", "Train an app with the sites of this coordinator's federation."),
    "lab": ("quorsum.simulation.lab_commands", "app", "Try attacks against rules in a grid, and report what held."),
    "site": ("quorsum.client.commands", "app", "Be a site: enroll, start, decide which apps run here."),
}


# Help pages are plain text, and Typer would escape their brackets for rich.
typer.core.HAS_RICH = False


class _Rooms(typer.core.TyperGroup):
    """The commands of this module, and those of the rooms."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *ROOMS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # For the list of commands a name and a sentence are enough.
        return (
            click.Command(cmd_name, help=ROOMS[cmd_name][2])
            if cmd_name in ROOMS
            else super().get_command(ctx, cmd_name)
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in ROOMS:
            return super().resolve_command(ctx, args)
        module, name, _ = ROOMS[args[0]]
        return args[0], typer.main.get_command(getattr(importlib.import_module(module), name)), args[1:]


app = typer.Typer(
    name="quorsum",
    cls=_Rooms,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated learning that is sealed and honest at the same time.",
)
say = Console(stderr=True, highlight=False)
# Whether the sentence about small models has been said; once is enough for several runs.
_SAID: list[bool] = []


def main() -> None:
    """Entry point of the ``quorsum`` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    # Flower reports usage and looks for updates unless told not to; a security tool does neither by default.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    # gRPC writes every failed handshake to stderr; what matters of them is said in our own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        status = int(app(args=arguments, prog_name="quorsum", standalone_mode=False) or EXIT_OK)
        if status == EXIT_INTERRUPTED:
            _complain("interrupted")
        return status
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "quorsum"
        _complain(f"{_lower(error.format_message())} (try: {command} --help)")
        return EXIT_USAGE
    except (UsageError, DataError) as error:
        _complain(str(error))
        return EXIT_USAGE
    except ModuleNotFoundError as error:
        _complain(
            f"this command needs the package {error.name!r}; install all that quorsum takes: "
            "pip install --upgrade 'quorsum[simulation]'"
        )
        return EXIT_USAGE
    except QuorsumError as error:
        _complain(str(error))
        return EXIT_UNKNOWN
    except (click.exceptions.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return EXIT_INTERRUPTED


def _complain(text: str) -> None:
    say.print(f"quorsum: {text}", markup=False, soft_wrap=True)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"quorsum {__version__}")
        raise typer.Exit


@app.command()
def simulate(
    data: Annotated[
        str,
        typer.Option(help="digits, breast-cancer, or a path: .npz, .csv, .txt, a folder of MNIST or CIFAR-10 files"),
    ] = "digits",
    label: Annotated[str | None, typer.Option(help="label column of a CSV file")] = None,
    key: Annotated[str | None, typer.Option(help="natural-key column of a CSV file, for --split key")] = None,
    sites: Annotated[int, typer.Option(help="number of sites")] = 10,
    poisoned: Annotated[int, typer.Option(help="how many of them are malicious")] = 2,
    attack: Annotated[
        str,
        typer.Option(
            help="none, sign-flip, label-flip, opt-alie, min-max, backdoor, ...; on the protocol: wrong-points, ..."
        ),
    ] = "sign-flip",
    rule: Annotated[
        str | None,
        typer.Option(help="robust rule, pre-aggregators first (default: spectral for sealed, else nnm+multi-krum)"),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="trusted site for fltrust and monna, such as site-01; it is never one of the poisoned"),
    ] = None,
    tolerate: Annotated[
        int | None, typer.Option(help="f, malicious sites to tolerate (default: as many as are poisoned)")
    ] = None,
    suite: Annotated[str, typer.Option(help="cipher suite: sealed, ckks or plain")] = "sealed",
    rounds: Annotated[int, typer.Option(help="rounds of training")] = 15,
    alpha: Annotated[str, typer.Option(help="Dirichlet concentration of the partition, or iid")] = "iid",
    split: Annotated[
        str | None,
        typer.Option(
            help="how data are dealt: iid, dirichlet:0.3, similarity:0.33, label:1, key (default: by --alpha)"
        ),
    ] = None,
    hoard: Annotated[
        bool, typer.Option("--hoard/--no-hoard", help="whether malicious sites get a share of the data")
    ] = True,
    model: Annotated[str, typer.Option(help="auto, linear, mlp, cnn, transformer, transformer+lora")] = "auto",
    clip: Annotated[
        bool | None,
        typer.Option("--clip/--no-clip", help="clip updates to the last round's median norm (default: sealed only)"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="local epochs per round (default: what suits the model)")] = None,
    steps: Annotated[int | None, typer.Option(help="local steps per round, instead of epochs")] = None,
    batch_size: Annotated[int, typer.Option(help="rows per local step")] = 32,
    lr: Annotated[float | None, typer.Option(help="local learning rate (default: what suits the model)")] = None,
    momentum: Annotated[float, typer.Option(help="local momentum, within a round")] = 0.9,
    site_momentum: Annotated[float, typer.Option(help="momentum of what sites submit, over rounds")] = 0.0,
    hidden: Annotated[int, typer.Option(help="width of the model's hidden layer (tables and digits)")] = 32,
    target: Annotated[int, typer.Option(help="class that backdoors aim at")] = 0,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="leave out for a while who is rejected far more often than by chance")
    ] = False,
    gate: Annotated[
        bool, typer.Option("--gate", help="check a new model before it is adopted, else roll back")
    ] = False,
    seed: Annotated[int, typer.Option(help="decides data split, partition, who is poisoned, training")] = 1,
    runtime: Annotated[str, typer.Option(help="local (this process) or ray (Flower's simulation runtime)")] = "local",
    out: Annotated[Path | None, typer.Option(help="folder for result.json and rounds.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as one JSON object")] = False,
) -> None:
    """Run a whole federation on this machine: train, poison, find, leave out."""
    from quorsum.simulation.run import Simulation

    settings = Simulation(
        data=data, label=label, key=key, sites=sites, poisoned=poisoned, attack=attack, rule=rule,
        reference=reference, tolerate=tolerate, suite=suite, rounds=rounds, alpha=_alpha(alpha), split=split,
        hoard=hoard, clip=clip, model=model, epochs=epochs, steps=steps, batch_size=batch_size, lr=lr,
        momentum=momentum, site_momentum=site_momentum, hidden=hidden, target=target, quarantine=quarantine,
        gate=gate, seed=seed, runtime=runtime,
    )  # fmt: skip
    _writable(out)
    result = _simulate_with_progress(settings)
    if out is not None:
        from quorsum.simulation.report import draw_rounds

        _write_json(out / "result.json", result)
        draw_rounds(result, out / "rounds.png")
        say.print(f"quorsum: wrote {out / 'result.json'} and {out / 'rounds.png'}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        from quorsum.simulation.report import summary_table

        Console().print(summary_table(result))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the results and the picture")] = Path("demo-out"),
    rounds: Annotated[int, typer.Option(help="rounds of each run")] = 15,
    seed: Annotated[int, typer.Option(help="seed of all runs")] = 1,
) -> None:
    """Ten sites, two of them poisoned: a plain mean without attack, under attack, and quorsum under the same attack."""
    from quorsum.simulation.demo import demo_runs
    from quorsum.simulation.report import comparison_table, draw_comparison

    _writable(out)
    started = time.perf_counter()
    results = []
    for name, settings in demo_runs(rounds=rounds, seed=seed):
        say.rule(f"[bold]{name}", align="left")
        result = _simulate_with_progress(settings)
        _write_json(out / f"{name.replace(' ', '-').replace(',', '')}.json", result)
        results.append((name, result))
    draw_comparison(results, out / "demo.png")
    Console().print(comparison_table(results))
    say.print(
        f"quorsum: wrote {out / 'demo.png'} after {time.perf_counter() - started:.0f} s; "
        "try it yourself: quorsum simulate --help",
        markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def keygen(
    out: Annotated[Path, typer.Option(help="file to write the shared site key to; must not exist")],
) -> None:
    """Make the secret key that all sites of a ckks federation share. Run it at one site; never at the coordinator."""
    from quorsum.crypto import generate_site_key

    key = generate_site_key(os.urandom)
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UsageError(f"{out} exists and is not overwritten; choose another name") from None
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; choose a folder that exists and is yours") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.to_bytes())
    typer.echo(key.key_id)
    say.print(
        f"quorsum: wrote {out}; carry it to every other site by a way the coordinator cannot read",
        markup=False,
        soft_wrap=True,
    )


def _alpha(text: str) -> float | None:
    if text == "iid":
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"--alpha must be a number above 0 or iid, got {text!r}") from None
    return value


def _writable(out: Path | None) -> None:
    """Find out before the work, not after it, that the results cannot be written."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None
    if not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to {out}: permission denied; choose another --out")


def _write_json(path: Path, result: Result) -> None:
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _simulate_with_progress(settings: Simulation) -> Result:
    """Simulate, with a bar on stderr and one line per finished round."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from quorsum.crypto.sealed_parameters import SEALED_V1, small_model
    from quorsum.simulation.models import learnable
    from quorsum.simulation.run import build_world
    from quorsum.simulation.run import simulate as run_simulation
    from quorsum.simulation.world import site_name

    # What is wrong with the settings or the data is said before any display begins.
    settings = settings.checked()
    world = build_world(settings)
    poisoned = {site_name(p) for p in world.poisoned}
    dimension = sum(tensor.numel() for tensor in learnable(world.new_model()).values())
    if settings.suite == "sealed" and small_model(dimension) and not _SAID:
        _SAID.append(True)
        _complain(
            f"{SEALED_V1.small_model_sentence(dimension)}; accepted here, because simulated data are nobody's secret"
        )
    for note in world.data.notes:
        _complain(note)
    _complain(
        f"{settings.sites} sites train on {world.data.name}; poisoned: {', '.join(sorted(poisoned)) or 'nobody'} "
        f"({settings.attack}); rule {settings.rule}, suite {settings.suite}"
    )
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
        TimeElapsedColumn(), console=say, transient=True, disable=not say.is_terminal,
    )  # fmt: skip

    with progress:
        task = progress.add_task("starting", total=settings.rounds)

        def on_phase(number: int, phase: str) -> None:
            progress.update(task, description=f"round {number}: {phase}")

        def on_round(record: RoundRecord) -> None:
            progress.console.print(_round_line(record, poisoned))
            progress.advance(task)

        return run_simulation(settings, world, on_phase=on_phase, on_round=on_round)


def _round_line(record: RoundRecord, poisoned: set[str]) -> Any:
    from rich.text import Text

    line = Text(f"round {record.round:3d}  accuracy {100 * record.metrics['accuracy']:5.1f} %  ")
    if record.failed:
        return line.append(record.failed, style="bold red")
    out = [
        Text(f"{site} ({record.codes[site]})", style="red" if site in poisoned else "yellow")
        for site in record.rejected
    ]
    missed = [Text(site, style="bold red") for site in record.accepted if site in poisoned]
    line.append("left out: ").append_text(Text(", ").join(out) if out else Text("nobody"))
    return line.append("; missed: ").append_text(Text(", ").join(missed)) if missed else line
