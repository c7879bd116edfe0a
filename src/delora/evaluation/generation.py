"""Pictures of a text-to-image pipeline of diffusers, with an adapter at several strengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import delora
from delora.evaluation.pictures import grid
from delora.training.denoising import network
from delora.training.models import loading

__all__ = ["SOLVERS", "pipeline", "sample", "strengths"]

SOLVERS: dict[str, Any] = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


def pipeline(model: str, weights: str = "fp32") -> Any:
    """A frozen pipeline without a safety checker, on the accelerator if there is one.

    ``model``: a folder, or a name on the Hugging Face Hub. ``weights``: "fp32" or "bf16".
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    asked: dict[str, Any] = {"dtype": dtype} | _without_checker(model)
    pipe = loading(DiffusionPipeline, model, **asked).to(device or torch.device("cpu"))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _without_checker(model: str) -> dict[str, None]:
    """What leaves out the safety checker, which the pipelines of Stable Diffusion 1 and 2 alone have."""
    try:
        return {"safety_checker": None} if "safety_checker" in DiffusionPipeline.load_config(model) else {}
    except (OSError, ValueError):
        return {}  # what is wrong with it is told where it is loaded


@torch.no_grad()
def sample(
    pipe: Any,
    prompt: str | list[str],
    seed: int | list[int],
    count: int,
    steps: int,
    guidance: float,
    resolution: int | None = None,
    solver: str = "dpm",
) -> list[Any]:
    """``count`` pictures for a prompt, always from the noise of ``seed``; or for several prompts, each with its own seed.

    ``solver``: "dpm" (multistep) or "ddim" (deterministic); a pipeline of flow matching has its own. The pipeline's own
    scheduler is put back afterwards.
    """
    kept, drawing = pipe.scheduler, network(pipe)
    training = drawing.training
    flows = isinstance(kept, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = (type(kept) if flows else SOLVERS[solver]).from_config(kept.config)
    drawing.eval()
    try:
        output = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=count,
            generator=[torch.Generator().manual_seed(s) for s in seed]
            if isinstance(seed, list)
            else torch.Generator().manual_seed(seed),
            height=resolution,
            width=resolution,
        )
        return list(output.images)
    finally:
        pipe.scheduler = kept
        drawing.train(training)


def strengths(
    pipe: Any,
    prompt: str,
    values: Sequence[float],
    seed: int,
    count: int,
    steps: int,
    guidance: float,
    resolution: int | None = None,
) -> Any:
    """A picture with a row for each strength of the network's adapter, from the same noise; 0 is the base model."""
    rows = []
    for value in values:
        delora.strength(network(pipe), value)
        rows.append(sample(pipe, prompt, seed, count, steps, guidance, resolution))
    delora.strength(network(pipe), 1.0)
    return grid(rows, [f"strength {value:g}" for value in values])
