"""Train the embedded demo model from random weights: python -m demo_training.train OUT, run in pipeline/.

The stages: draw pictures (`pictures.py`), train a VAE on them, train a UNet of Stable Diffusion 1.x's architecture on
its latents, and write the model to OUT in diffusers' folder format, in fp16, with a model card. The result of each
stage is kept in OUT.work and used again by a later start; an interrupted stage starts over.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from demo_training.dataset import draw_dataset
from demo_training.unet import encode_images, new_unet, train_unet
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

    started = time.monotonic()
    images, captions = draw_dataset(options.seed, options.pictures)
    print(f"{len(images)} pictures drawn in {time.monotonic() - started:.0f} s", flush=True)
    base = write_demo_model(work / "base")  # its tokenizer, text encoder and scheduler are used
    vae = load_or_create(work / "vae.pt", lambda: train_vae(images, options.vae_steps, options.seed, device))
    latents = load_or_create(work / "latents.pt", lambda: encode_images(vae["model"], images, options.seed, device))
    unet = load_or_create(
        work / "unet.pt",
        lambda: train_unet(latents, captions, base, options.unet_steps, options.seed, device, work),
    )
    write_model(options.out, base, vae, unet, vars(options), len(images))


def load_or_create(path: Path, create: Callable[[], Any]) -> Any:
    """The result of a stage: from `path` if an earlier start saved it there, otherwise created and saved."""
    if not path.exists():
        torch.save(create(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path, weights_only=True)


def write_model(
    out: Path, base: Path, vae: dict[str, Any], unet: dict[str, Any], options: dict[str, Any], count: int
) -> None:
    """Write the model folder in fp16, with a model card of options and measurements."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("demo.json"))
    trained, loaded = {"vae": vae, "unet": unet}, {"vae": new_vae(), "unet": new_unet()}
    for name, model in loaded.items():
        model.load_state_dict(trained[name]["model"])
        model.half().save_pretrained(out / name, safe_serialization=True)
    card = (HERE / "MODEL_CARD.md").read_text(encoding="utf-8")
    filled = card.format(
        **{key: options[key] for key in ("seed", "vae_steps", "unet_steps")},
        device=device_name(options["device"]),
        pictures=count,
        channels=CHANNELS,
        skimage=version("scikit-image"),
        vae_psnr=vae["psnr"],
        photos_psnr=psnr(loaded["vae"].float(), quickstart_photos(), torch.device("cpu")),
        **{f"{name}_loss": stage["loss"] for name, stage in trained.items()},
        **{f"{name}_minutes": stage["seconds"] / 60 for name, stage in trained.items()},
        **{f"{name}_parameters": sum(p.numel() for p in model.parameters()) / 1e6 for name, model in loaded.items()},
    )
    (out / "MODEL_CARD.md").write_text(filled, encoding="utf-8")


def quickstart_photos() -> torch.Tensor:
    """The content images of the quickstart, (N, 3, 256, 256) uint8; none is in the training data."""
    files = sorted((HERE.parents[1] / "manifests" / "quickstart" / "content").iterdir())
    cropped = [ImageOps.fit(Image.open(file).convert("RGB"), (256, 256)) for file in files]
    return torch.from_numpy(np.stack([np.asarray(image) for image in cropped])).permute(0, 3, 1, 2)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU cores"


if __name__ == "__main__":
    main()
