"""The command line: `python -m eval` measures everything; further commands measure one thing closely."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from hf_gallery.files import read_json, write_json

from . import attention, benchmark, compare, gpu, long, memory, peers, pictures, rates, report, zoo
from .cells import Run
from .contestants import CONTESTANTS
from .machine import provenance
from .outside import OUTSIDE
from .presets import PRESETS, Preset
from .processes import this_process
from .workers import WorkerError, Workers, count

app = typer.Typer(
    help="Measure what each architecture remembers, how well it models text, and what it costs.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console(markup=False)  # what users typed stands in what is printed, and may hold square brackets

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
ShareOption = Annotated[float, typer.Option(min=1e-3, max=1.0, help="Share of the preset's training steps.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


def _command() -> str:
    return shlex.join(["python", "-m", "eval", *sys.argv[1:]])


def _refuse(error: Exception) -> typer.Exit:
    Console(stderr=True).print(Text.assemble(("error", "red"), f" {error}"))
    return typer.Exit(2)


def _preset(name: str, share: float) -> Preset:
    """A preset with that share of its training. Raises ValueError for a name that there is not."""
    if name not in PRESETS:
        raise ValueError(f"--preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name].shortened(share)


def _folder(path: Path) -> Path:
    """The folder, made. Raises ValueError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"no folder can be made at {path} ({error.strerror}); give another --runs or --name"
        ) from None
    return path


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    preset: Annotated[str, typer.Option(help="; ".join(f"{p.name}: {p.about}" for p in PRESETS.values()))] = "quick",
    variants: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, of {', '.join(CONTESTANTS)}; default: all of these. From outside the gallery, and "
            f"only where they are named: {', '.join(OUTSIDE)}."
        ),
    ] = None,
    contestant: Annotated[
        list[Path] | None,
        typer.Option(
            help="A config.json of a causal model of transformers, or its folder, that takes part too, in its own "
            "size; may be given again."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help=f"Comma-separated, of {', '.join(benchmark.TASKS)}; default: the preset's.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds; default: the preset's.")] = None,
    share: ShareOption = 1.0,
    corpus: Annotated[
        str, typer.Option(help="stdlib, a folder of text, pg19, wikitext-103, enwik8, or hf:NAME.")
    ] = "stdlib",
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the preset's.")] = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, envvar="GALLERY_WORKERS", help="Cells measured at once; default: one for each core, on a GPU one."
        ),
    ] = None,
    reuse: Annotated[
        Path | None,
        typer.Option(
            help="A results.json; what it holds that was measured with this run's settings is taken from it."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what this run has measured before.")] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Measure anew what other code than this has measured.")
    ] = False,
) -> None:
    """Measure every variant on every task. Stop it at any time: the same command goes on where it was.

    Example: python -m eval --preset quick --variants transformer,transformer_xl
    """
    if context.invoked_subcommand is not None:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    process = this_process()
    shown = console if process.is_main else Console(quiet=True, markup=False)
    try:
        chosen = _preset(preset, share)
        where = benchmark.choose_device(device)
        contestants = benchmark.choose_contestants(variants)
        wanted = list(chosen.tasks) if tasks is None else benchmark.choose(tasks, benchmark.TASKS, "--tasks")
        asked = (chosen, [c.name for c in contestants], wanted, seeds, corpus, where)
        own = benchmark.own_contestants(contestant or [])
        cells = benchmark.plan_by_names(*asked, own=own)
        folder = Run(_folder(runs / (name or chosen.name)))
        if fresh and process.of > 1:
            raise ValueError(f"--fresh is for one process; remove {folder.folder / 'cells'} and launch again")
        published = None if reuse is None else report.read_file(reuse)
        if fresh:
            folder.forget()
        if published is not None:
            shown.print(f"{folder.adopt(published, cells)} of {len(cells)} cells are taken from {reuse}")
        beside = None
        if process.of == 1 and (many := count(where, workers)) > 1:
            plan = functools.partial(benchmark.plan_by_names, *asked, own=own)
            beside = Workers(many, plan, folder.folder, where, _command())
        folder.complete(cells, where, _command(), shown, process, beside, stale)
    except (ValueError, WorkerError) as error:
        raise _refuse(error) from None
    except KeyboardInterrupt:
        shown.print(f"\nstopped; finished cells are kept in {folder.folder}, and the same command goes on from there")
        raise typer.Exit(130) from None
    if not process.is_main:
        return
    measured = benchmark.measured(folder, chosen, corpus, where)
    before = read_json(folder.folder / report.RESULTS)
    kept = before.get("peers") if isinstance(before, dict) else None
    results = benchmark.collect(chosen, measured) | {"peers": _latest_peers(runs) or kept}
    report.write(folder.folder, results)
    report.show(results, console)
    console.print(f"\nresults  {folder.folder / report.RESULTS}\nreport   {folder.folder / report.PAGE}")


@app.command("rates")
def rates_command(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "quick",
    variants: Annotated[str | None, typer.Option(help="Comma-separated; default: all of the gallery.")] = None,
    share: ShareOption = 1.0,
    corpus: Annotated[str, typer.Option(help="As python -m eval takes it.")] = "stdlib",
    name: Annotated[str | None, typer.Option(help="Name of the run; default: rates_PRESET.")] = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, envvar="GALLERY_WORKERS", help="Cells measured at once; as python -m eval.")
    ] = None,
) -> None:
    """Train every contestant on text at three learning rates, and tell which is best on validation text.

    Example: python -m eval rates --preset quick
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        where = benchmark.choose_device(device)
        chosen = _preset(preset, share)
        asked = (chosen, [c.name for c in benchmark.choose_contestants(variants)], corpus, where)
        cells, folder = rates.plan(*asked), Run(_folder(runs / (name or f"rates_{preset}")))
        beside = None
        if (many := count(where, workers)) > 1:
            beside = Workers(many, functools.partial(rates.plan, *asked), folder.folder, where, _command())
        found = folder.complete(cells, where, _command(), console, workers=beside)
    except (ValueError, WorkerError) as error:
        raise _refuse(error) from None
    except KeyboardInterrupt:
        console.print(f"\nstopped; finished cells are kept in {runs}, and the same command goes on from there")
        raise typer.Exit(130) from None
    results = rates.collect(chosen, found)
    path = folder.folder / report.RESULTS
    write_json(path, results)
    rates.show(results, console)
    console.print(f"\nresults  {path}")


@app.command("report")
def report_command(
    name: Annotated[str, typer.Argument(help="Name of the run, or a results.json.")] = "quick",
    runs: RunsOption = Path("runs"),
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table in Markdown, and nothing else.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw recall by distance into this .png or .svg too.")
    ] = None,
) -> None:
    """Show the table of a run again, and write its page anew; beside the file, where one is given. The results
    themselves stay as they are.

    Example: python -m eval report quick
    """
    try:
        results = report.read(name, runs)
        if picture is not None:
            pictures.forgetting_curves(results, picture)
    except (OSError, ValueError) as error:
        raise _refuse(error) from None
    if markdown:
        typer.echo(report.markdown(results))
        return
    if not name.endswith(".json"):
        results["peers"] = _latest_peers(runs) or results.get("peers")
    report.show(results, console)
    try:
        path = report.write_page(report.place(name, runs), results)
    except OSError as error:
        raise _refuse(error) from None
    console.print(f"\nreport   {path}")


@app.command("compare")
def compare_command(
    first: Annotated[str, typer.Argument(help="Name of a run, or a results.json.")],
    second: Annotated[str, typer.Argument(help="Name of the run to hold against it, or a results.json.")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Hold two runs against each other: what changed, and whether it is more than chance.

    Example: python -m eval compare eval/results/quick.json quick
    """
    try:
        found = compare.differences(report.read(first, runs), report.read(second, runs))
        if not found:
            raise ValueError(f"{first} and {second} measured nothing that both have")
    except ValueError as error:
        raise _refuse(error) from None
    names = Path(first).stem, Path(second).stem
    compare.show(names if names[0] != names[1] else (first, second), found, console)


@app.command("attention")
def attention_command(
    runs: RunsOption = Path("runs"),
    length: Annotated[int, typer.Option(min=256, help="Tokens.")] = 4096,
    span: Annotated[int, typer.Option(min=1, help="Keys that a query sees before itself.")] = 256,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Time the gallery's attention against torch's fused kernels on the same band, and weigh its memory.

    Example: python -m eval attention --length 4096 --span 256
    """
    settings = attention.AttentionSettings(length=length, span=span, repeats=repeats)
    _measure("attention", attention, settings, torch.device("cpu"), runs)


@app.command("long")
def long_command(
    runs: RunsOption = Path("runs"),
    tokens: Annotated[int, typer.Option(min=2000, help="Tokens of the long context.")] = 100_000,
    device: DeviceOption = "auto",
) -> None:
    """Read a very long input with each bounded variant, then decode: is a token as cheap as after a short one?

    Example: python -m eval long --tokens 100000
    """
    settings = dataclasses.replace(long.default_settings(), long=tokens)
    _measure("long", long, settings, _device(device), runs)


@app.command("gpu")
def gpu_command(
    runs: RunsOption = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Under four minutes on an H100.")] = False,
) -> None:
    """Check every kernel on this machine's GPU, then time attention beside torch's own, training steps and decoding.

    Example: python -m eval gpu --quick
    """
    device = _device("cuda")
    path, where = runs / "gpu" / "results.json", provenance(device, _command())
    settings = gpu.QUICK if quick else gpu.GpuSettings()
    gpu.run(settings, console.print, lambda found: write_json(path, found | {"provenance": where}))
    console.print(f"\nresults  {path}")


@app.command("memory")
def memory_command(
    runs: RunsOption = Path("runs"),
    size: Annotated[int, typer.Option(min=512, help="Memories of each row and head.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    device: DeviceOption = "auto",
) -> None:
    """Time a training step of the Memorizing Transformer with its memory full and without memory.

    Example: python -m eval memory --size 8192
    """
    _measure("memory", memory, memory.MemorySettings(memory_size=size, repeats=repeats), _device(device), runs)


@app.command("peers")
def peers_command(
    runs: RunsOption = Path("runs"),
    only: Annotated[str | None, typer.Option(help="Comma-separated comparisons; default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Time the gallery against what a user would pick instead: the same work, both sides in turns.

    Peers that are not here are installed into environments of their own under the runs folder.

    Example: python -m eval peers --only longformer,transformer
    """
    settings = peers.PeerSettings(repeats=repeats)
    try:
        names = benchmark.choose(only, peers.PEERS, "--only")
        folder = _folder(runs / "peers")
    except ValueError as error:
        raise _refuse(error) from None
    with console.status("peers") as status:
        result = peers.run(settings, runs / "environments", names, lambda doing: status.update(f"peers: {doing}"))
    peers.show(result, console)
    path = folder / report.RESULTS
    write_json(path, result | {"provenance": provenance(torch.device("cpu"), _command())})
    console.print(f"\nresults  {path}")


@app.command("zoo")
def zoo_command(
    books: Annotated[str, typer.Argument(help="Folder of long texts, with sub-folders train and test to choose.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the models, one in each sub-folder.")] = Path("zoo"),
    only: Annotated[str | None, typer.Option(help="Comma-separated contestants; default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 2,048 bytes.")] = zoo.ZooSettings().steps,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "zoo",
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "auto",
) -> None:
    """Train a model of each architecture on the same books, and save it with its measured card. Stop it at any time:
    the same command goes on from the last checkpoint.

    Example: python -m eval zoo my_books --only transformer_xl
    """
    settings, where = dataclasses.replace(zoo.ZooSettings(), steps=steps), _device(device)
    try:
        names = benchmark.choose(only, zoo.ANIMALS, "--only")
        folder = Run(_folder(runs / name))
        folder.complete(list(zoo.plan(names, settings, books, folder.folder, out, where)), where, _command(), console)
    except ValueError as error:
        raise _refuse(error) from None
    except KeyboardInterrupt:
        console.print(f"\nstopped; the same command goes on from the last checkpoint in {runs / name}")
        raise typer.Exit(130) from None
    console.print(f"\nmodels   {out}")


def _latest_peers(runs: Path) -> dict[str, Any] | None:
    """The last results of `peers`, for the page of a run; None if there are none that can be shown."""
    found = read_json(runs / "peers" / report.RESULTS)
    return found if peers.is_whole(found) else None


def _device(name: str) -> torch.device:
    try:
        return benchmark.choose_device(name)
    except ValueError as error:
        raise _refuse(error) from None


def _measure(name: str, part: ModuleType, settings: Any, device: torch.device, runs: Path) -> None:
    """Runs one of the closer measurements, shows it, and keeps it with where it was measured."""
    try:
        path = _folder(runs / name) / report.RESULTS
    except ValueError as error:
        raise _refuse(error) from None
    with console.status(name) as status:
        result = part.run(settings, device, tick=lambda doing: status.update(f"{name}: {doing}"))
    part.show(result, console)
    write_json(path, result | {"provenance": provenance(device, _command())})
    console.print(f"\nresults  {path}")
