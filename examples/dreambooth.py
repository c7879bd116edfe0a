"""Teach a text-to-image model a subject with DeLoRA, in plain PyTorch and diffusers; write a LoRA file that diffusers reads.

    python examples/dreambooth.py FOLDER_OF_STABLE_DIFFUSION FOLDER_OF_PHOTOGRAPHS "a photo of qwe dog"

Without arguments: the small model in paper/standins/weights/fashion learns a striped boot, in about a minute on two cores. The
whole recipe, with prior preservation, crops, scores and exact resume, is ``delora train
paper/recipes/subject/sd15-dreambooth.toml``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

import delora
from delora import DeLoRA


def learn(unet, scheduler, latents, text, steps):
    """Latents [pictures, channels, h, w] and the prompt's embedding [1, tokens, width]; the U-Net is adapted in place."""
    delora.inject(unet, DeLoRA(r=16, lam=4.0, start="copy", learn_lam=True), targets=r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)")
    print(delora.summary(unet))
    optimizer = torch.optim.AdamW(delora.param_groups(unet, lr=2e-2, lam_lr=1e-3, weight_decay=0.01))
    for step in range(steps):
        clean = latents[step % len(latents)][None]
        noise = torch.randn_like(clean)
        t = torch.randint(scheduler.config.num_train_timesteps, (1,), device=clean.device)
        predicted = unet(scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=text).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_([p for p in unet.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"mean |dW| / |W| after {steps} steps: {np.mean(list(delora.distances(unet).values())):.3f}")


def main(model, photographs, prompt, steps=1000):
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor  # 512 for Stable Diffusion 1.5
    files = sorted(Path(photographs).glob("*.[jp][pn]g"))
    pictures = [Image.open(file).convert("RGB").resize((side, side)) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in pictures]).to(pipe.device)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        text, _ = pipe.encode_prompt([prompt], pipe.device, 1, do_classifier_free_guidance=False)
    learn(pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config), latents, text, steps)
    delora.save(pipe.unet, "subject")
    print("written:", delora.export.diffusers(pipe, "subject-lora"), "for pipe.load_lora_weights('subject-lora')")
    pipe(prompt, num_inference_steps=25).images[0].save("subject.png")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(*sys.argv[1:])
    else:
        root = Path(__file__).parents[1]
        sys.path.insert(0, str(root))  # the stand-ins are no part of the package
        from paper.standins import fashion

        small = root / "paper" / "standins" / "weights" / "fashion"
        main(small, fashion.subjects() / "striped_boot", "a photo of qwe boot", steps=200)
