"""The study for a GPU: a 60 M parameter Llama, V = 32,000, answers of 256 tokens.

    python examples/frontier/scale_up.py --output scale.json
    python examples/frontier/scale_up.py --help            every size is an option

It has not run on a GPU yet; the tests run it on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from fastdpo.demo.frontier.scale import ScaleConfig, run_scale


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("scale.json"), help="the record")
    for field in dataclasses.fields(ScaleConfig):
        many = isinstance(field.default, tuple)
        kind = float if many else type(field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            nargs="+" if many else None,
            default=field.default,
            help=" ",
        )
    given = vars(parser.parse_args())
    output = given.pop("output")
    given["betas"] = tuple(given["betas"])
    try:
        config = ScaleConfig(**given)
    except ValueError as error:
        parser.error(str(error))
    run_scale(config, output)


if __name__ == "__main__":
    main()
