"""Whether two runs saw the same data in the same splits, wherever the files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from lit_defect.data.samples import Sample

_LENGTH = 16  # hexadecimal digits


def fingerprint(samples: Mapping[str, Iterable[Sample]], length_of: Callable[[str], int | None]) -> str:
    """Hash over the samples of each split, independent of their order, of the data set's root and of the machine.

    Of a sample count its name (relative to the root), label, generator, mirroring, and the lengths of its picture and
    mask in bytes. A file that changes but not in length is not noticed: times of change differ from copy to copy, and
    reading every byte would take longer than many a training.

    Args:
        samples: by split.
        length_of: path -> bytes; None where that is unknown.
    """
    lines = sorted(
        repr((split, s.name, s.label, s.source, s.mirror, length_of(s.path), length_of(s.mask) if s.mask else None))
        for split, found in samples.items()
        for s in found
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_LENGTH]
