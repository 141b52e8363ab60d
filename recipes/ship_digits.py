"""Makes the checkpoint of `erde-hub demo`, which is a run of `make demo` in the package, and publishes its results.

    python recipes/ship_digits.py                       # trains; minutes
    python recipes/ship_digits.py --run runs/digits-1   # takes what `make demo` has left

Then `python recipes/make_tables.py` writes the tables anew. Tests check that the report holds on the test set, and that
it is the published one.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from erde_hub.data import load_image_data
from erde_hub.evaluation import load_results, save_results
from erde_hub.scripts.playground.networks import PICTURES
from erde_hub.scripts.playground.samples import MOST_IMAGES, SHIPPED

RECIPES = Path(__file__).parent
CARD = RECIPES.parent / "model_cards" / "digits"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "results.json")


def main() -> None:
    """Trains, copies, and keeps the first images of the test set with their labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder that `make demo` has left; default: one is made")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory() as made:
        if run is None:
            run = Path(made) / "digits"
            subprocess.run(
                [sys.executable, RECIPES / "distill.py", "--config", "digits", "--output_dir", run], check=True
            )
        SHIPPED.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(Path(run) / name, SHIPPED / name)
        results = load_results(SHIPPED / "results.json")
        results["figures"] = [*PICTURES, "sample.png"]  # the card and the page show no others
        for path in (SHIPPED / "results.json", RECIPES / "results" / "digits.json"):
            save_results(results, path)
        CARD.mkdir(parents=True, exist_ok=True)
        for name in results["figures"]:
            shutil.copyfile(Path(run) / name, CARD / name)
        for name in PICTURES:  # half the size and few colours: they travel in the package
            with Image.open(CARD / name) as drawn:
                small = (
                    drawn.convert("RGB").reduce(2).quantize(32, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                )
            for folder in (CARD, SHIPPED):
                small.save(folder / name, optimize=True)
    test = load_image_data("digits").test
    images = np.stack([np.asarray(image.convert("L")) for image in test.images(range(MOST_IMAGES))])
    np.savez_compressed(SHIPPED / "samples.npz", images=images, labels=test.labels[:MOST_IMAGES].numpy())


if __name__ == "__main__":
    main()
