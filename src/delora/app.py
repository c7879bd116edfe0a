"""``delora app``: a page in the browser for finished runs, the base model beside the adapted ones, the strength as a slider."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch

import delora
from delora import tasks
from delora.errors import UserError
from delora.formats.native import require_adapter
from delora.models import adapter_names, adapters
from delora.training.runs import adapter_in
from delora.training.task import Kind

__all__ = ["MOST", "Blend", "Shown", "blended", "page", "shown"]

MOST = 2.0  # the slider's right end
WIDE = 256  # pixels: a narrower picture is enlarged by a whole factor
BLEND = "blend"  # the name of the sum beside the adapters that it is made of
LAYERS = 40  # bars of the picture of layers; of more, those that changed most


@dataclass(frozen=True)
class Shown:
    """What the page shows of a run. ``answer(prompt)`` is the model's, at whatever strength it has.

    An answer is {class: probability}, a text or a picture.

    >>> Shown("mine", "text", None, str.upper).answer("a")
    'A'
    """

    title: str
    kind: Kind
    model: Any
    answer: Callable[[str], Any]
    report: Path | None = None
    base: str = ""
    turning: Any = field(default_factory=RLock, repr=False, compare=False)  # gradio asks from several threads

    def at(self, strength: float, prompt: str) -> Any:
        """The answer at a strength of the adapter: 0 is the base model, with what was trained whole as it is trained.

        What such a module was before, a new head above all, may be random: a base with it would answer at random.
        """
        with self.turning:
            self.turn(strength)
            return self.answer(prompt)

    def own(self) -> float:
        """The strength that the adapter was saved with: 1, unless another one was chosen."""
        placed = adapters(self.model).values()
        return next((a.strength for a in placed if not a.whole), 1.0)

    def turn(self, strength: float) -> None:
        """Set the strength of what `at` turns; where all was trained whole, of that."""
        placed = adapters(self.model).values()
        for each in [a for a in placed if not a.whole] or list(placed):
            each.adapter.strength = strength

    def layers(self, strength: float) -> Any:
        """A picture of each layer's |W' - W| / |W| at a strength, and of its bound where the method has one."""
        from matplotlib.figure import Figure

        with self.turning:
            self.turn(strength)
            found = {n: r for n, r in delora.diagnostics.inspect(self.model).items() if r.relative is not None}
        most = sorted(found, key=lambda n: -(found[n].relative or 0.0))[:LAYERS]
        names = [name for name in found if name in most][::-1]
        figure = Figure(figsize=(8, 1.2 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(names, [100 * (found[n].relative or 0.0) for n in names], color="#0f766e", label="|W' - W|")
        bounds = {n: 100 * r.relative / r.bound_used for n in names if (r := found[n]).bound_used and r.relative is not None}
        if bounds:
            axes.plot(list(bounds.values()), list(bounds), "|", color="#b45309", markersize=9, label="bound")
            axes.set_xscale("log")
        axes.set_xlabel("of |W| [%]")
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=8)
        return figure


def _placed(model: Any) -> None:
    """On the accelerator, where there is one, in evaluation mode."""
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()


def shown(run: Path, adapter: Path | None = None) -> Shown:
    """The finished run in a folder, its adapter (or another one's folder) loaded into its base model.

    Raises:
        UserError: the folder holds no finished run, or its task has nothing to answer.
    """
    experiment = tasks.of_run(run)
    folder = adapter or adapter_in(run)
    require_adapter(folder)
    kind, model, answer = tasks.find(experiment.task).respond(experiment, folder)
    delora.load(model, folder, methods=experiment.adapter.classes())
    _placed(model)
    report = run / "report.html"
    return Shown(experiment.name, kind, model, answer, report if report.is_file() else None, experiment.model)


@dataclass(frozen=True)
class Blend:
    """The adapters of several runs in one model, named by their places: 1, 2, ..."""

    model: Any
    answer: Callable[[str], Any]
    turning: Any = field(default_factory=RLock, repr=False, compare=False)

    def at(self, weights: Sequence[float], prompt: str) -> Any:
        """The answer at W + sum of weight * (W' - W) over the runs, each W' at strength 1 (`delora.blend`)."""
        with self.turning:
            if BLEND in adapter_names(self.model):
                delora.activate(self.model, "1")
                delora.eject(self.model, BLEND)
            delora.blend(self.model, {str(n): w for n, w in enumerate(weights, 1)}, BLEND)
            return self.answer(prompt)


def blended(*folders: Path) -> Blend:
    """The adapters of finished runs of one base model, loaded into it once more.

    Raises:
        UserError: a folder holds no finished run; or an adapter is of another base, is not low-rank, or trained a module whole.
    """
    first = tasks.of_run(folders[0])
    _, model, answer = tasks.find(first.task).respond(first, adapter_in(folders[0]))
    for number, folder in enumerate(folders, 1):
        name = str(number)
        delora.load(model, adapter_in(folder), name=name, methods=tasks.of_run(folder).adapter.classes())
        if whole := [layer for layer, a in adapters(model, name).items() if a.whole]:
            raise UserError(
                f"{folder} trained {', '.join(whole)} whole, and the sum of two such modules answers for neither: blends are "
                "for runs that trained adapters alone"
            )
        delora.strength(model, 1.0, name)
    _placed(model)
    blend = Blend(model, answer)
    try:
        delora.blend(model, dict.fromkeys(adapter_names(model), 0.0), BLEND)
    except ValueError as error:
        raise UserError(f"these runs have no blend: {error}") from error
    return blend


def enlarged(picture: Any) -> Any:
    """A picture, larger by a whole factor if it is small; every pixel stays a square.

    >>> from PIL import Image
    >>> enlarged(Image.new("RGB", (32, 32))).size, enlarged(Image.new("RGB", (512, 512))).size
    ((256, 256), (512, 512))
    """
    times = max(1, WIDE // picture.width)
    return picture.resize((times * picture.width, times * picture.height), 0)  # 0: the nearest pixel


def page(*runs: Shown, blend: Blend | None = None) -> Any:
    """The page, a ``gradio.Blocks``, which ``launch`` serves: the base model, beside it each run's, and their blend.

    Prompts and names are shown as text, whatever they contain.

    Raises:
        UserError: the runs are not of one base model and one kind; or gradio is not installed.
    """
    first = runs[0]
    for run in runs:
        if (run.kind, run.base) != (first.kind, first.base):
            raise UserError(
                f"{run.title} answers with {run.kind} of {run.base}, and {first.title} with {first.kind} of {first.base}: one "
                "page shows runs of one base model"
            )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install "delora[app]"') from error

    def output(label: str, name: str) -> Any:
        if first.kind == "classes":
            return gr.Label(label=label, elem_id=name)
        if first.kind == "picture":
            # Without gradio's button that sends a picture away.
            return gr.Image(label=label, format="png", elem_id=name, buttons=["download", "fullscreen"])
        return gr.Textbox(label=label, lines=8, elem_id=name)

    base_says = lru_cache(maxsize=8)(lambda prompt: first.at(0.0, prompt))  # the slider moves, the base does not

    def answers(prompt: str, strength: float, *weights: float) -> list[Any]:
        if not prompt.strip():
            raise gr.Error("Write something first.")
        try:
            said = [base_says(prompt), *(run.at(strength, prompt) for run in runs)]
            if blend is not None:
                said.append(blend.at([strength * weight for weight in weights], prompt))
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error
        return [enlarged(each) for each in said] if first.kind == "picture" else said

    titles = [run.title for run in runs]
    named = [t if titles.count(t) == 1 else f"{t} ({n})" for n, t in enumerate(titles, 1)]  # of one name: told apart by place
    title = ", ".join(named)
    with gr.Blocks(title=f"delora: {title}", analytics_enabled=False) as blocks:
        gr.HTML(f"<h2>{html.escape(title)}</h2>")
        prompt = gr.Textbox(label="Prompt", lines=1, info="Enter asks, Shift+Enter begins a line", elem_id="prompt")
        strength = gr.Slider(
            0,
            MOST,
            value=min(first.own(), MOST),
            step=0.05,
            label="Strength: 0 is the base, 1 what was trained",
            elem_id="strength",
        )
        weights = [
            gr.Slider(0, 1, 1 / len(runs), step=0.05, label=f"Weight of {name} in the blend", elem_id=f"weight-{n}")
            for n, name in enumerate(named if blend is not None else (), 1)
        ]
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Row():
            whole = any(a.whole for a in adapters(first.model).values())
            trained = f", with what {named[0] if len(runs) > 1 else 'was'} trained whole" if whole else ""
            columns = [output(f"Base model{trained}", "base")]
            for number, name in enumerate(named, 1):
                columns.append(output("Adapted" if len(runs) == 1 else name, f"adapted-{number}"))
            if blend is not None:
                columns.append(output("Blend", "blend"))
        asked = [prompt, strength, *weights]
        ask.click(answers, asked, columns)
        prompt.submit(answers, asked, columns)
        for slider in (strength, *weights):
            slider.release(lambda p, *at: answers(p, *at) if p.strip() else [None] * len(columns), asked, columns)
        for run, name in zip(runs, named, strict=True):
            of_run = f" ({name})" if len(runs) > 1 else ""
            if any(not a.whole for a in adapters(run.model).values()):
                with gr.Accordion(f"How far each layer is from the base{of_run}", open=False):
                    plot = gr.Plot(show_label=False)
                    gr.Button("Draw").click(run.layers, strength, plot)
            if run.report is not None:
                with gr.Accordion(f"The run's report{of_run}", open=False):
                    # Without scripts and without this page's rights.
                    text = html.escape(run.report.read_text("utf-8"), quote=True)
                    gr.HTML(f'<iframe sandbox srcdoc="{text}" style="width: 100%; height: 80vh; border: 0"></iframe>')
    return blocks
