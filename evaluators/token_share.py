"""What accuracy and agreement share: of the predicted tokens those that hit, as a measurement."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


def token_share(
    name: str, hits: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32], subject: Subject
) -> Measurement:
    """The share as a fraction of which more is better; the standard error is `statistics.clustered_mean`'s.

    Args:
        name: Of the measurement.
        hits: [n], of each predicted token whether it counts.
        documents: [n], each token's document.
        subject: Whose tokens they are.
    """
    value, stderr = clustered_mean(hits, documents)
    return Measurement(
        name=name,
        value=value,
        unit="fraction",
        direction="max",
        source="simulated",
        stderr=stderr,
        detail={"split": subject.split, "tokens": hits.size, "documents": np.unique(documents).size},
        documents=per_document(hits, documents),
    )
