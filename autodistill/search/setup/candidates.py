"""GGUF files of the teacher's model that the user names: rivals of solutions, and possible starts of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
from autodistill.search.construction.construction import Construction
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.solve.bench import Bench, Measured, Sample
from autodistill.search.solve.call.candidates import Candidate, check_candidate, open_candidate
from autodistill.search.solve.cuts import whole_allowed
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.strategy.strategy import Init
from autodistill.units import format_bytes

_IN_SOLVE = "leave it out here: autodistill solve --candidate measures it as it is"


def init_of(reference: str) -> Init:
    """Return the init of a student that starts as a file of the teacher's model."""
    return Init(source="pretrained", model=reference, depth=1.0)


def open_candidates(config: SearchConfig) -> list[Candidate]:
    """Read the headers of the named files, before anything is downloaded or converted.

    Raises:
        InputError: A file is damaged, or of another model.
    """
    return [open_candidate(Path(one), config.spec) for one in config.candidates]


def check_candidates(candidates: list[Candidate], teacher: Path, spec: ModelSpec) -> None:
    """Compare the files' metadata of model and tokenizer with the teacher's.

    Raises:
        InputError: A file has another model or tokenizer, or no GGUF file can hold the teacher's tokenizer.
    """
    for one in candidates:
        if spec.text_not_in_gguf:
            raise InputError(f"a GGUF file cannot hold this teacher: {spec.text_not_in_gguf}; leave --candidate out")
        check_candidate(one, teacher, spec)


def beginning(reference: str, cache: Path) -> tuple[Teacher, str]:
    """Make a folder of a pretrained model. If it is a quantised GGUF file, the folder also has the scales of its codes.

    Args:
        reference: Reference of the model.
        cache: Root of caches.

    Returns:
        The model in its folder, and a note for the user, which may be empty.
    """
    found = resolve_teacher(reference)
    made = materialize(found, cache)
    if found.quantized is None:
        return made, ""
    made, stored = stored_as(found, made, spec_from_config(read_config(made.folder)), cache)
    if stored is None or stored.deployment is None or stored.exact:
        return made, ""
    return made, (
        f"some blocks of {found.path} cannot be packed again as they are: training from it begins with these rounded "
        f"again to {stored.deployment.name}"
    )


def check_rows(reference: str, rows: npt.NDArray[np.int64]) -> None:
    """Refuse a file whose token ids differ from the teacher's, since the rows of its tables would be reordered.

    Args:
        reference: The file.
        rows: The file's row for each token of the teacher, -1 for none.

    Raises:
        InputError: The token ids differ.
    """
    known = np.flatnonzero(rows >= 0)
    if not np.array_equal(rows[known], known):
        raise InputError(f"{reference} numbers its tokens differently from the teacher: {_IN_SOLVE}")


def candidate_constructions(
    config: SearchConfig,
    options: Options,
    library: Library,
    bench: Bench,
    sample: Sample,
    notify: Callable[[str], None],
) -> list[Construction]:
    """Measure the named files from which training may begin, in the same way as solutions.

    Every file is a row as it is. One is not trained, and the user is told so, if it does not fit, if its types are not
    written here, or if the space does not have them.

    Args:
        config: The request, which names them.
        options: The options within the budget.
        library: Keeps the measurements.
        bench, sample: The teacher, and the calibration text.
        notify: Called with a message about each file that is not trained.

    Raises:
        InputError: A file has other weights than the teacher.
    """
    found = []
    for reference in config.candidates:
        one = _with_cache(open_candidate(Path(reference), options.spec), options)
        deployment = one.deployment
        need = one.memory(options).total_bytes
        if why := _not_trained(one, need, config, options):
            for _ in one.weights(bench):  # refuses a file of other weights
                pass
            notify(f"{one.name} is a row as it is, and is not trained: {why}")
            continue

        def measure(*texts: Sample, one: Candidate = one) -> tuple[Measured, ...]:
            """Return the measurements of the file on each text."""
            return bench.measure_weights(one.weights(bench), one.cache_types, texts)

        (joint,) = library.kept(one.key, one.name, (sample,), measure)
        found.append(
            Construction(
                init=init_of(reference),
                deployment=deployment,
                bytes=need,
                kl=joint.kl,
                kl_stderr=joint.kl_stderr,
                own_codes=True,
            )
        )
    return found


def _not_trained(one: Candidate, need: int, config: SearchConfig, options: Options) -> str:
    """Return why training does not begin from a file that takes `need` bytes of memory, or "" if it may."""
    if one.stored is None:
        return "it has types that a search does not write"
    if not (whole_allowed(options) and options.allows(one.deployment)):
        return f"the space {config.declared.name} does not include the whole teacher as {one.deployment.name}"
    if options.fits(one.deployment):
        return ""
    why = "is too slow" if options.fits_memory(one.deployment) else f"takes {format_bytes(need)}"
    return f"it {why}, and the limit is {config.budget.describe()}"


def _with_cache(one: Candidate, options: Options) -> Candidate:
    """Return the file with the only allowed cache type, or else with a cache that fits."""
    kind = options.cache_type
    return one.fitting(options) if kind is None else one.with_cache((kind, kind))
