"""The usual way to inner products under CKKS, for comparison: every block of every pair, exactly.

TenSEAL's ``dot`` multiplies, relinearises, rescales and adds up the slots by rotations. This measures it on a few
blocks with the usual parameters (N = 8192, moduli of 60, 40 and 60 bits) and multiplies by the blocks and pairs.

    python benchmarks/exact_gram.py --dimension 1000000 --sites 10
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import tenseal as ts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dimension", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=12, help="blocks measured")
    options = parser.parse_args()
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1)
    context.global_scale = 2.0**40
    context.generate_galois_keys()
    rng = np.random.default_rng(0)
    pairs = [[ts.ckks_vector(context, rng.normal(size=4096).tolist()) for _ in range(2)] for _ in range(options.blocks)]
    clock = time.perf_counter()
    for first, second in pairs:
        first.dot(second)
    each = (time.perf_counter() - clock) / options.blocks
    blocks = -(-options.dimension // 4096)
    count = options.sites * (options.sites + 1) // 2
    print(
        json.dumps(
            {
                "seconds_per_block_and_pair": each,
                "blocks": blocks,
                "pairs": count,
                "seconds": each * blocks * count,
                "note": "extrapolated from the measured blocks",
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
