"""The +-1 code of every token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.launcher.needle.spec import NeedleSpec

Array = npt.NDArray[np.float64]


def token_codes(spec: NeedleSpec, seed: int) -> Array:
    """Codes of all tokens, ``[vocabulary, code_dims]`` of +-1.

    The first ``info_bits`` values are the bits of a permuted id, so each token has its own code. With a parity value
    after them, which makes the number of ones even, two codes differ in at least two values.

    The permutation is one in which every bit is 1 for four to six of the ten digits: under the identity ASCII digits
    share five bits, and the heads that answer these would never matter.
    """
    vocabulary = spec.vocabulary
    attempt = 0
    while True:
        ids = np.random.default_rng((seed, attempt)).permutation(vocabulary.size)
        bits = (ids[:, None] >> np.arange(spec.info_bits)) & 1
        ones = bits[list(vocabulary.digits)].sum(axis=0)
        if ones.min() >= 4 and ones.max() <= 6:
            break
        attempt += 1
    if spec.parity:
        bits = np.concatenate([bits, bits.sum(axis=1, keepdims=True) % 2], axis=1)
    return (2.0 * bits - 1.0).astype(np.float64)
