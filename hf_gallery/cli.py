"""The command line: `hf-gallery list | zoo | spans | train | generate | look | eval | convert | card | push`.

Messages for people go to stderr, output that a script may read to stdout. Exit codes: 0 success, 1 failure, 2
usage error. Imports that only one command needs stand in it.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import one_line

app = typer.Typer(
    name="hf-gallery",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FolderArgument = Annotated[
    Path, typer.Argument(help="A folder that holds a saved model.", exists=True, file_okay=False)
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="The folder of a saved causal model, or its repository on the Hub.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def _plainly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors are told in a line, without a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):  # are RuntimeErrors too
            raise
        except Exception as error:
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    return run


def _say_version(wanted: bool):
    if wanted:
        from . import __version__

        typer.echo(f"hf-gallery {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
):
    """Long-sequence transformers: train, run, measure, convert and publish them."""


def _variants_like(incomplete: str) -> list[str]:
    """For the shell: names of variants that begin so."""
    from .variants import VARIANTS

    return [name for name in VARIANTS if name.startswith(incomplete)]


@app.command("list")
@_plainly
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all classes.")] = False,
) -> None:
    """Show the variants, their papers and their heads.

    Example: hf-gallery list
    """
    from .variants import VARIANTS

    if as_json:
        rows = []
        for v in VARIANTS.values():
            about = {"name": v.name, "title": v.title, "authors": v.authors, "idea": v.idea}
            rows.append(about | {"paper": v.paper, "config": v.config.__name__, "heads": v.auto_classes})
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("paper and idea")
    table.add_column("heads", no_wrap=True)
    for v in VARIANTS.values():
        prefix = v.config.__name__.removesuffix("Config")
        heads = "\n".join(name.removeprefix(prefix).removeprefix("For") for name in v.auto_classes.values())
        table.add_row(v.name, f"{v.authors}: {v.idea}", heads)
    Console().print(table)


@app.command()
@_plainly
def zoo(
    folder: Annotated[Path | None, typer.Argument(help="A folder of trained models; default: the checkout's.")] = None,
) -> None:
    """Show the trained models, best first; `generate`, `look` and `eval` open them by their folder.

    Example: hf-gallery zoo
    """
    from .zoo import ZOO, zoo_models

    table = Table()
    table.add_column("folder", no_wrap=True)
    for heading in ("parameters", "bytes read", "bits/byte"):
        table.add_column(heading, justify="right")
    for model in zoo_models(folder or ZOO):
        read = "-" if model.trained_bytes is None else f"{model.trained_bytes:,}"
        bits = "-" if model.bits_per_byte is None else f"{model.bits_per_byte:.3f}"
        place = os.path.relpath(model.folder) if model.folder.is_relative_to(Path.cwd()) else str(model.folder)
        table.add_row(place, f"{model.parameters:,}", read, bits)
    Console().print(table)


@app.command()
@_plainly
def spans(
    variant: Annotated[str, typer.Argument(help="A variant's name (see `list`).", autocompletion=_variants_like)],
    *,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A config argument, NAME=VALUE; give it as often as needed."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Length of the text; default three times the longest window or segment.")
    ] = None,
    marks: Annotated[
        list[int] | None, typer.Option("--global", help="Position of a global token, of a variant that has them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The SVG file to write; default stdout.", dir_okay=False)] = None,
) -> None:
    """Draw which keys each query sees and by what road: window, memory, global tokens, retrieval, state.

    Example: hf-gallery spans transformer_xl --set segment_length=8 --set mem_len=16 --out xl.svg
    """
    from .drawing import draw
    from .files import write_text

    drawn = draw(variant, settings=dict(_setting(x) for x in settings or []), tokens=tokens, marks=marks or ())
    if out is None:
        typer.echo(drawn, nl=False)
    else:
        write_text(out, drawn)
        typer.echo(out)


@app.command()
@_plainly
def train(
    model: Annotated[
        str,
        typer.Argument(
            help="A variant's name (see `list`), or a saved causal model: its folder, or its repository on the Hub.",
            autocompletion=_variants_like,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the trained model; its checkpoints go there too.")],
    *,
    corpus: Annotated[
        str, typer.Option(help="stdlib, a folder of text, pg19, wikitext-103, enwik8, or hf:NAME.")
    ] = "stdlib",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A config argument of a new model, NAME=VALUE; give it as often as needed."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    lanes: Annotated[int, typer.Option(min=1, help="Documents that are read side by side.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a segment, which each lane reads in a step.")] = 512,
    backpropagate_segments: Annotated[
        int, typer.Option(min=1, help="Segments that a gradient passes back through; a step then reads as many.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    seed: int = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in OUT.")] = False,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a model on long documents, its memory carried along, and print its bits per token on held-out ones.

    Example: hf-gallery train transformer_xl my-model --corpus my_texts --steps 2000 --set num_hidden_layers=6
    """
    from transformers import TrainingArguments, set_seed

    from .data import load_corpus
    from .training import SegmentTrainer, newest_whole

    set_seed(seed)
    net, tokenizer = _model_to_train(model, settings or [], revision)
    checkpoints = out / "checkpoints"
    if resume and not checkpoints.is_dir():
        raise ValueError(f"--resume, but {checkpoints} holds no checkpoint; leave --resume out to start")
    last = newest_whole(checkpoints) if resume else None
    if resume and last is None:
        typer.echo(f"{checkpoints} holds no whole checkpoint: the training begins anew", err=True)
    if not resume and any(checkpoints.glob("checkpoint-*")):
        raise ValueError(f"{checkpoints} holds a training that was begun; go on with --resume, or give another folder")
    splits = load_corpus(corpus)
    ids = splits.map(
        lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text", "document"]
    )
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=lanes,
        per_device_eval_batch_size=lanes,
        gradient_accumulation_steps=backpropagate_segments,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=max(1, steps // 100),
        seed=seed,
        report_to=[],
        use_cpu=_device(device).type == "cpu",
    )
    trainer = SegmentTrainer(
        net,
        arguments,
        segment_length=length,
        backpropagate_segments=backpropagate_segments,
        train_dataset=ids["train"],
        eval_dataset=ids["validation"],
        processing_class=tokenizer,
    )
    with redirect_stdout(sys.stderr):  # the Trainer's log
        trainer.train(resume_from_checkpoint=last)
        metrics = trainer.evaluate()
        trainer.save_model(str(out))
    wanted = ("eval_loss", "eval_bits_per_token", "eval_bits_per_byte", "eval_tokens")
    typer.echo(json.dumps({"folder": str(out)} | {name: metrics[name] for name in wanted if name in metrics}))


def _model_to_train(model: str, settings: list[str], revision: str | None) -> tuple[Any, Any]:
    """A new small model of a variant with the byte tokenizer, or a saved one with its own."""
    from .data import byte_tokenizer
    from .models.configuration_base import UNLIMITED
    from .opening import open_causal
    from .variants import VARIANTS

    arguments = dict(_setting(text) for text in settings)
    if model in VARIANTS:
        if revision is not None:
            raise ValueError(f"--revision is {revision!r}, but {model} is a new model; revisions are the Hub's")
        tokenizer = byte_tokenizer()
        config = VARIANTS[model].make_config(**{"vocab_size": len(tokenizer)} | arguments)
        if config.n_positions < UNLIMITED:  # a table of positions may be longer than the input that it has room for
            tokenizer.model_max_length = config.n_positions
        return VARIANTS[model].causal(config), tokenizer
    if not Path(model).exists() and "/" not in model:
        near = difflib.get_close_matches(model, VARIANTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{model!r} is neither a variant ({', '.join(VARIANTS)}) nor a folder, nor USER/NAME on the Hub{hint}"
        )
    if arguments:
        raise ValueError(f"--set {next(iter(arguments))} is for new models; {model} has its config")
    return open_causal(model, revision)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--set is {text!r}; it must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except (json.JSONDecodeError, RecursionError):  # the latter for brackets without end
        return name, value


@app.command()
@_plainly
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to continue; - or nothing reads it from stdin.")] = "-",
    *,
    document: Annotated[
        Path | None,
        typer.Option(
            "--file", help="A text to be read before the prompt, of any length.", exists=True, dir_okay=False
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="What was read before, by --save-cache, in place of --file.", exists=True)
    ] = None,
    save_cache: Annotated[
        Path | None, typer.Option(help="Keep what --file left in memory, for other prompts.")
    ] = None,
    any_weights: Annotated[
        bool, typer.Option("--any-weights", help="Take a --cache though other weights than the model's made it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt; the text streams to stdout as it comes.

    Read a book once, ask twice: hf-gallery generate my-model --file book.txt --save-cache book.cache "Chapter 1"

    Example: hf-gallery generate my-model "def main(" --max-new-tokens 100 --temperature 0.8
    """
    import torch
    from transformers import TextStreamer, set_seed

    from . import GalleryCache
    from .opening import open_causal

    if cache is not None and document is not None:
        raise ValueError("--cache and --file are both given; --cache is what was read, so leave --file out")
    if save_cache is not None and document is None:
        raise ValueError("--save-cache keeps what --file leaves; give --file")
    if save_cache is not None:  # before a long text is read for it
        above = save_cache.parent
        if save_cache.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(
                f"--save-cache is {save_cache}, which cannot be written; give a file in a folder of yours"
            )
    read = None if cache is None else _cache(cache, any_weights)
    text = None if document is None else _text(document)
    if prompt == "-":
        prompt = sys.stdin.read()
    where = _device(device)
    net, tokenizer = open_causal(model, revision)
    net = net.to(where).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(where)
    if not ids.shape[1]:
        raise ValueError("the prompt is empty; give at least a character to go on from")
    if read is not None:
        try:
            read.check(net.config, 1)
            read.check_weights(net.base_model)
        except ValueError as error:
            raise ValueError(
                f"--cache is {cache}, which does not fit {model}: {error}. Read the text again, by --file and "
                "--save-cache with this model; --any-weights takes one of the same model with other weights"
            ) from error
        read = read.to(where)
    if text is not None:
        read = GalleryCache(net.config)
        whole = tokenizer(text, return_tensors="pt").input_ids.to(where)
        with torch.no_grad(), typer.progressbar(whole.split(2048, dim=1), label="reading", file=sys.stderr) as parts:
            for part in parts:
                net(part, past_key_values=read, logits_to_keep=1)
        if save_cache is not None:
            read.save(save_cache)
    if read is not None:  # generate() counts the columns that were read, and looks at the new ones only
        ids = torch.cat([ids.new_zeros(1, read.get_seq_length()), ids], dim=1)
    set_seed(seed)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature else dict(do_sample=False)
    net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=read,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **sampling,
    )


def _cache(path: Path, any_weights: bool) -> Any:
    """The cache that --save-cache wrote."""
    from . import GalleryCache

    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"--cache is {path}, which is empty; write it anew by --file and --save-cache")
    try:
        return GalleryCache.load(path, any_weights=any_weights)
    except Exception as error:  # what is no cache may fail anywhere
        raise ValueError(f"--cache is {path}, which --save-cache did not write: {one_line(error)}") from error


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file is {path}, which is no text in utf-8: {error}") from error
    if not text:
        raise ValueError(f"--file is {path}, which is empty; give a text, or leave --file out")
    return text


@app.command("look")
@_plainly
def look_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The folder of a saved causal model or encoder, or its repository on the Hub."
        ),
    ],
    text: Annotated[str, typer.Argument(help="What is read; - or nothing reads it from stdin.")] = "-",
    *,
    document: Annotated[
        Path | None, typer.Option("--file", help="A text of any length in place of TEXT.", exists=True, dir_okay=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The page that is written.")] = Path("look.html"),
    at: Annotated[
        list[int] | None,
        typer.Option(min=0, help="A token to be kept key by key, by position; give it as often as needed."),
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="And of those that surprise most, how many.")] = 32,
    worth: Annotated[bool, typer.Option(help="Read the text again without each source.")] = True,
    reach: Annotated[bool, typer.Option(help="Measure how far back a token matters.")] = True,
    marks: Annotated[
        list[int] | None,
        typer.Option("--global", min=0, help="A token that Longformer sees from everywhere, by position; repeatable."),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Watch a model read: one page, which opens offline, with what each token was predicted from, what each source is
    worth in bits, how far back tokens matter, and which passages are fetched. Of an encoder, under any head, what each
    token looks at.

    Example: hf-gallery look my-model --file book.txt --out book.html
    """
    from .files import write_text
    from .looking import look
    from .looking.page import page, words_of
    from .opening import open_stack

    if document is not None and text != "-":
        raise ValueError("--file and TEXT are both given; leave one of them out")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {out}, which cannot be written; give a file in a folder that is there")
    read = _text(document) if document is not None else sys.stdin.read() if text == "-" else text
    net, tokenizer = open_stack(model, revision)
    net = net.to(_device(device))
    # Encoders know texts that special tokens frame; what a causal model reads goes on and on.
    ids = tokenizer(read, return_tensors="pt", add_special_tokens=not net.can_generate()).input_ids[0]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; give 2 or more, since the first is predicted by nothing")
    more = {"global_attention_mask": _marks(net, len(ids), marks)} if marks else {}
    found = look(net, ids, at=at or [], most=most, worth=worth, reach=reach, progress=_Stages(), **more)
    name = document.name if document is not None else "a text"
    title = f"{Path(model).name} reads {name}"
    about = f"Made by hf-gallery look {model}; {len(ids):,} tokens, {type(net).__name__}."
    write_text(out, page(found, words_of(tokenizer, found.ids), title, about))
    typer.echo(out)


def _marks(net: Any, length: int, marks: list[int]) -> Any:
    """Marks (1, T) of the global tokens at these positions."""
    import torch

    if not hasattr(net.config, "attention_window"):
        raise ValueError(f"--global is {marks[0]}, and a {type(net).__name__} has no global tokens; leave it out")
    beyond = [x for x in marks if x >= length]
    if beyond:
        raise ValueError(f"--global is {beyond[0]}; the text has the positions 0 to {length - 1}")
    return torch.zeros(1, length, dtype=torch.long).index_fill(1, torch.tensor(marks), 1).to(net.device)


class _Stages:
    """Says on stderr what is being done, and once how long a reading will take."""

    def __init__(self):
        self.began, self.stage = time.monotonic(), ""

    def __call__(self, stage: str, done: int, of: int):
        if stage != self.stage:
            self.stage = stage
            more = ""
            if stage == "reading" and done < of:
                took = (time.monotonic() - self.began) * of / done
                more = f", about {took:.0f} s; each reading without a source takes no longer"
            typer.echo(stage + more, err=True)


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_plainly
def eval_command(
    context: typer.Context,
    model: ModelArgument,
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-eval, comma-separated.")] = "gallery_memory",
    model_args: Annotated[
        str, typer.Option("--model_args", help="Arguments of the model, prefill_chunk_size=512 for example; or JSON.")
    ] = "",
    revision: RevisionOption = None,
) -> None:
    """Measure a saved model with lm-eval; further options are handed over to it.

    Example: hf-gallery eval my-model --tasks gallery_memory,gallery_lm --limit 20
    """
    from .opening import check_causal

    try:
        from .harness import main as measure
    except ImportError as error:
        raise ImportError(f'{error}; install what measuring needs: pip install "hf-gallery[eval]"') from None
    check_causal(model, revision)
    # As JSON, since a path may hold a comma; lm-eval joins what comes by the option twice.
    about = {"pretrained": model} | ({} if revision is None else {"revision": revision})
    arguments = ["--model_args", json.dumps(about)]
    arguments += ["--model_args", model_args] if model_args else []
    raise typer.Exit(measure([*arguments, "--tasks", tasks, *context.args]))


@app.command()
@_plainly
def convert(
    source: Annotated[str, typer.Argument(help="A folder, or a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or not there.")],
    to: Annotated[str | None, typer.Option(help="The variant it becomes, where there is a choice.")] = None,
    revision: RevisionOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the conversion, NAME=VALUE.")
    ] = None,
) -> None:
    """Turn a published checkpoint into a gallery checkpoint that gives the same outputs.

    Example: hf-gallery convert openai-community/gpt2 my-gpt2 --to memorizing_transformer --set memory_layers=[9]
    """
    from .convert import check_settings
    from .convert import convert as run

    options = dict(_setting(text) for text in settings or [])
    check_settings(options)
    typer.echo(run(source, out, to=to, revision=revision, **options))


@app.command()
@_plainly
def card(
    variant: Annotated[
        str | None,
        typer.Argument(help="A variant's name; leave it out with --all.", autocompletion=_variants_like),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="A trained model; its card goes there as README.md.", exists=True)
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="A results.json of `python -m eval`, for the numbers; of several the first that has some.",
            exists=True,
        ),
    ] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where it will be on the Hub.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Cards of all variants, into the folder --out.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the cards that --all writes.")] = Path("model_cards"),
) -> None:
    """Render a model card: to stdout, or into the folder of a trained model.

    Example: hf-gallery card transformer_xl --folder my-model
    """
    if everything == (variant is not None):
        raise ValueError("give a variant's name, or --all")
    from .cards import render_card, with_numbers, write_cards
    from .files import write_text

    if everything:
        if not results:
            raise ValueError("--all writes cards with measured numbers; give --results")
        write_cards(out, *results)
        return
    numbers = with_numbers(str(variant), results) if results else None
    text = render_card(str(variant), folder=folder, results=numbers, repo_id=repo_id)
    if folder is None:
        typer.echo(text)
    else:
        write_text(folder / "README.md", text)
        typer.echo(folder / "README.md")


@app.command()
@_plainly
def push(
    folder: FolderArgument,
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Upload a saved model with its code, tokenizer and card, in one commit. The token is huggingface_hub's own.

    Example: hf-gallery push my-model me/my-model --private
    """
    from .hub import push as run

    typer.echo(run(folder, repo_id, private=private, revision=revision, message=message))


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:NUMBER") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, and torch finds no GPU here; leave it at auto, or say cpu")
    return found
