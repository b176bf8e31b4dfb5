"""The share of predicted tokens that count as hits, for accuracy and agreement."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


def token_share(
    name: str, hits: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32], subject: Subject
) -> Measurement:
    """Return the share of hits as a measurement. The standard error is that of `statistics.clustered_mean`.

    Args:
        name: Name of the measurement.
        hits: [n], whether each predicted token counts.
        documents: [n], the document of each token.
        subject: The subject that was scored.
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
