"""Train the embedded demo model from nothing: python -m demo_training.train OUT, run in pipeline/.

Pictures are drawn (`pictures.py`), a VAE learns to hold them, a UNet of Stable Diffusion 1.x's shape learns to denoise
its latents, and OUT gets the model in diffusers' folder format, fp16, with a card: seeds, data, losses, time.
Each stage is kept in OUT.work and not done twice; a stage that was killed starts over.
"""

from __future__ import annotations

import argparse
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from demo_training.dataset import draw_pool
from demo_training.unet import encode_pool, new_unet, train_unet
from demo_training.vae import CHANNELS, new_vae, psnr, train_vae
from stylemill.demo.untrained import write_demo_model

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2400)
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--unet-steps", type=int, default=2400)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    work = options.out.with_name(options.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)

    begun = time.monotonic()
    pool, captions = draw_pool(options.seed, options.pictures)
    print(f"{len(pool)} pictures drawn in {time.monotonic() - begun:.0f} s", flush=True)
    write_demo_model(work / "frame")  # tokenizer, text encoder, scheduler
    vae = kept(work / "vae.pt", lambda: train_vae(pool, options.vae_steps, options.seed, device))
    latents = kept(work / "latents.pt", lambda: encode_pool(vae["model"], pool, options.seed, device))
    unet = kept(
        work / "unet.pt",
        lambda: train_unet(latents, captions, work / "frame", options.unet_steps, options.seed, device, work),
    )
    write(options.out, work / "frame", vae, unet, vars(options), len(pool))


def kept(path: Path, make: Any) -> Any:
    if not path.exists():
        made = make()
        torch.save(made, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path, weights_only=True)


def write(out: Path, frame: Path, vae: dict[str, Any], unet: dict[str, Any], told: dict[str, Any], count: int) -> None:
    """The model as diffusers reads it, in fp16, and what was measured while it learnt."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(frame, out, ignore=shutil.ignore_patterns("demo.json"))
    trained, loaded = {"vae": vae, "unet": unet}, {"vae": new_vae(), "unet": new_unet()}
    for name, model in loaded.items():
        model.load_state_dict(trained[name]["model"])
        model.half().save_pretrained(out / name, safe_serialization=True)
    card = (HERE / "MODEL_CARD.md").read_text(encoding="utf-8")
    filled = card.format(
        **{key: told[key] for key in ("seed", "vae_steps", "unet_steps")},
        device=machine(told["device"]),
        pictures=count,
        channels=CHANNELS,
        skimage=version("scikit-image"),
        vae_psnr=vae["psnr"],
        photos_psnr=psnr(loaded["vae"].float(), photos(), torch.device("cpu")),
        **{f"{name}_loss": stage["loss"] for name, stage in trained.items()},
        **{f"{name}_minutes": stage["seconds"] / 60 for name, stage in trained.items()},
        **{f"{name}_parameters": sum(p.numel() for p in model.parameters()) / 1e6 for name, model in loaded.items()},
    )
    (out / "MODEL_CARD.md").write_text(filled, encoding="utf-8")


def photos() -> torch.Tensor:
    """The quickstart's, (N, 3, 256, 256): none of them was trained on."""
    files = sorted((HERE.parents[1] / "manifests" / "quickstart" / "content").iterdir())
    cut = [ImageOps.fit(Image.open(file).convert("RGB"), (256, 256)) for file in files]
    return torch.from_numpy(np.stack([np.asarray(image) for image in cut])).permute(0, 3, 1, 2)


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU cores"


if __name__ == "__main__":
    main()
