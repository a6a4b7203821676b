"""Duplicates, exact or nearly so."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stillhouse.errors import EnvironmentFault
from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.filters.ngrams import ngrams, raw_words, words
from stillhouse.rollouts.offline.samples import Sample

Compare = Literal["both", "prompt", "response"]


@REGISTRY.register
class Duplicates(Filter):
    """Keeps only the first of responses that are equal but for case and spaces.

    Responses are compared with those of the same source.
    """

    kind: Literal["duplicates"] = "duplicates"
    compare: Compare = "both"
    """What has to be equal: prompt and response together, the prompt, or the response."""

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """Compares the words between spaces, by 16 bytes of a digest of them."""
        digests = array("q")
        for sample in samples:
            key = [" ".join(raw_words(text)).casefold() for text in _texts(sample, self.compare)]
            content = "\0".join(key).encode("utf-8", "surrogatepass")
            digests.frombytes(hashlib.blake2b(content, digest_size=16).digest())
        verdicts: list[Drop | None] = [None] * len(samples)
        for place, first in _repeated(np.asarray(digests).reshape(-1, 2)):
            verdicts[place] = Drop("duplicate", f"of {samples[first].response.prompt.id}")
        return verdicts


def _repeated(keys: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The place of each row that is equal to an earlier one, and the first place of such a row.

    In memory are 17 bytes of each row beside its key: of many millions, no dictionary would fit.
    """
    order = np.lexsort(keys.T)  # stable: of equal rows the first comes first
    equal = np.ones(max(0, len(keys) - 1), dtype=bool)
    for column in keys.T:
        ordered = column[order]
        equal &= ordered[1:] == ordered[:-1]
    first, before = 0, -2
    for at in np.flatnonzero(equal).tolist():
        first = first if at == before + 1 else int(order[at])
        before = at
        yield int(order[at + 1]), first


@REGISTRY.register
class NearDuplicates(Filter):
    """Keeps only the first of responses with nearly the same word n-grams; needs the extra `curate`.

    The Jaccard similarity of two sets of n-grams is estimated by MinHash, and candidates are found by
    locality-sensitive hashing (Broder 1997; datasketch). The hash functions are fixed, so the result is
    reproducible.

    Example: `{kind: near_duplicates, threshold: 0.8}`
    """

    kind: Literal["near_duplicates"] = "near_duplicates"
    compare: Compare = "both"
    """What is compared: prompt and response together, the prompt, or the response."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """The estimated similarity from which a response is a duplicate."""
    n: Annotated[int, Field(ge=1)] = 3
    """Words in an n-gram; a shorter text is one n-gram."""
    num_hashes: Annotated[int, Field(ge=16)] = 128
    """Hash functions: the estimate's standard error is about sqrt(s (1 - s) / num_hashes), 0.035 at 0.8."""

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """Estimates the similarity to the responses kept before."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise EnvironmentFault(
                "the filter near_duplicates needs datasketch. "
                "Install it with: pip install 'stillhouse[curate]'"
            ) from None
        # Weights that prefer false candidates, which are compared anyway, to missed ones; no bands above 0.9.
        index = MinHashLSH(threshold=min(self.threshold, 0.9), num_perm=self.num_hashes, weights=(0.1, 0.9))
        kept: dict[int, MinHash] = {}
        verdicts: list[Drop | None] = []
        for place, sample in enumerate(samples):
            sketch = MinHash(num_perm=self.num_hashes, seed=1)
            sketch.update_batch([" ".join(gram).encode() for gram in self._ngrams(sample)])
            similar = [(kept[other].jaccard(sketch), -other) for other in index.query(sketch)]
            similarity, other = max(similar, default=(0.0, 0))
            if similarity >= self.threshold:
                name = samples[-other].response.prompt.id
                verdicts.append(Drop("near duplicate", f"{similarity:.2f} like {name}"))
                continue
            index.insert(place, sketch)
            kept[place] = sketch
            verdicts.append(None)
        return verdicts

    def _ngrams(self, sample: Sample) -> list[tuple[str, ...]]:
        parts = [word for text in _texts(sample, self.compare) for word in words(text) or text.split()]
        return sorted(set(ngrams(parts, min(self.n, max(1, len(parts)))))) or [("",)]


def _texts(sample: Sample, compare: Compare) -> tuple[str, ...]:
    prompt, response = sample.response.prompt.question, sample.text
    return {"both": (prompt, response), "prompt": (prompt,), "response": (response,)}[compare]
