"""The claims of DDPM, tried: `python -m benchmarks.claims --data digits`.

Trains small models, measures them, and prints Markdown tables. Every stage is kept in a folder, so that it can be
interrupted and goes on where it was; `--print` prints what is there. With `--only`, processes beside each other can
share the seeds out.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.claims import data as data_sets
from benchmarks.claims import table
from benchmarks.claims.cache import Cache
from benchmarks.claims.study import STEPS, USUAL, VARIANTS, Study, compute
from pipelines.errors import UserError
from pipelines.report import grid
from pipelines.store import Place

PICTURED = 64


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    try:
        data = data_sets.load(options.data, options.fashion)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    out = Place.of(options.out)
    seeds = range(options.seeds)
    images = options.images or data.work.images
    try:
        if not options.print:
            chosen = [seed for seed in seeds if options.only is None or seed in options.only]
            compute(Study(data, Cache(out), images, options.threads), chosen, options.steps)
    except KeyboardInterrupt:
        print(f"stopped: what is done lies in {out}, the same command goes on from there", file=sys.stderr)
        return 130
    found = Study(data, Cache(out, compute=False), images, options.threads)
    print("\n\n".join(table.tables(found, seeds)))
    _draw(found, out, seeds[0])
    return 0


def _draw(study: Study, out: Place, seed: int) -> None:
    """A picture of what each model of a seed draws."""
    for name, variant in VARIANTS.items():
        drawn = study.drawn(variant, seed, USUAL)
        if drawn is not None:
            (out / f"{study.data.name}-{name.replace(', ', '-').replace(' ', '-')}.png").write(grid(drawn[:PICTURED]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description="The claims of DDPM, tried.")
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--fashion", type=Path, default=data_sets.FASHION, metavar="FOLDER", help="its IDX files")
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="compute these alone")
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=STEPS, help="of the samplers compared")
    parser.add_argument("--images", type=int, help="training budget of each model, images seen")
    parser.add_argument("--threads", type=int, default=2, help="part of every result's identity")
    parser.add_argument("--out", default="claims-out", help="folder of the results (%(default)s)")
    parser.add_argument("--print", action="store_true", help="print what is there, compute nothing")
    options = parser.parse_args()
    for name in ("seeds", "threads", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, not {value}")
    if options.only is not None and not set(options.only) <= set(range(options.seeds)):
        parser.error(f"--only: seeds are 0..{options.seeds - 1}")
    return options


if __name__ == "__main__":
    sys.exit(main())
