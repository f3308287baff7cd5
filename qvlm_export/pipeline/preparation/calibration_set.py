"""What an export calibrates with: the user's data, the built-in drawn scenes, or texts that the float model writes itself.

Texts of the float model are not known before its weights are read; entries of their greatest length stand in for them, so
that an export can be estimated and checked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.inference.self_calibration import COUNT, FILE, Draft, plan_drafts, repeats_itself, stand_ins
from qvlm_export.inputs.samples import Entry, default_calibration, read_entries

SELF, BUILT_IN = "self", "built-in"  # values of --calib-data
FOLDER = "calibration_set"  # in X.calibrated, of a set that the model wrote
MAX_SAMPLES = 128  # used at most when --samples is not given
HELD_OUT, LEAST_SAMPLES = 4, 32  # samples that accuracy is measured on, and from how many on these are held out


@dataclass(frozen=True)
class CalibrationSet:
    """The entries of a calibration set.

    name: of the file, SELF or BUILT_IN. note: why it was chosen, to be printed; None where the user chose it. entries: what
    is asked and answered; stand-ins where `drafts`, the conversations that are to be written, are not empty.
    """

    name: str = ""
    note: str | None = None
    entries: tuple[Entry, ...] = ()
    drafts: tuple[Draft, ...] = ()


EMPTY = CalibrationSet()


def choose_calibration_set(
    calib_data: Path | None,
    samples: int | None,
    *,
    searched: bool,
    needed_bytes: int,
    memory_bytes: int,
    length: int,
    image_tokens: int,
) -> CalibrationSet:
    """Returns the set that `--calib-data` and `--samples` ask for.

    Without `--calib-data` the model writes its own where a search calibrates and memory suffices: round-to-nearest takes
    nothing but the largest values from the data, and is done sooner than texts are written. needed_bytes: memory that
    writing takes. memory_bytes: what there is for it. length: of the longest sample in tokens. image_tokens: of a picture.
    Raises UserError, naming file and line, for data that are not valid, and where `self` is asked for and memory does not
    suffice.
    """
    if calib_data is not None and str(calib_data) in (SELF, BUILT_IN):
        if calib_data.exists():
            raise UserError(f"--calib-data {calib_data}: is a choice, and a file here; give the file by its full path")
    elif calib_data is not None:
        return CalibrationSet(calib_data.name, None, tuple(read_entries(calib_data, samples, MAX_SAMPLES)))
    fits = needed_bytes <= memory_bytes
    sizes = f"{needed_bytes / 2**30:.1f} GiB of memory, of {memory_bytes / 2**30:.1f} GiB"
    if str(calib_data) == SELF and not fits:
        raise UserError(
            f"--calib-data self: the float model takes {sizes}, when it writes its calibration set; give data of your own, "
            "or built-in"
        )
    if str(calib_data) == SELF or (calib_data is None and searched and fits):
        drafts = tuple(plan_drafts(samples or COUNT, read_entries(default_calibration(), None, MAX_SAMPLES)))
        note = (
            f"calibrating with {len(drafts)} conversations that the model writes first, as --calib-data was not given; 64 "
            "or more of your own pictures and prompts are better"
        )
        return CalibrationSet(SELF, None if calib_data else note, tuple(stand_ins(drafts, length, image_tokens)), drafts)
    entries = tuple(read_entries(default_calibration(), samples, MAX_SAMPLES))
    why = f"writing its own takes the model {sizes}" if searched else "--calib-data was not given"
    note = (
        f"calibrating with {len(entries)} of the package's own drawn scenes, as {why}: activation ranges of your pictures "
        "and prompts may be clipped, which costs accuracy; give 64 or more real ones"
    )
    return CalibrationSet(BUILT_IN, None if calib_data else note, entries)


def read_calibration_file(calib_data: Path | None) -> list[Entry]:
    """Returns the entries of `--calib-data`, or the built-in ones where it names no file."""
    named = calib_data is not None and str(calib_data) not in (SELF, BUILT_IN)
    return read_entries(calib_data if named and calib_data else default_calibration(), None, MAX_SAMPLES)


def describe_faults(entries: Sequence[Entry]) -> list[str]:
    """Returns what is to be said of a set that a model wrote: how many answers are empty, and how many texts repeat.

    They stay in the set, as the model says the same in use. Raises UserError when all answers are empty.
    """
    silent = sum(not entry.line.answer for entry in entries)
    looping = sum(repeats_itself(f"{entry.line.prompt} {entry.line.answer or ''}") for entry in entries)
    if silent == len(entries):
        raise UserError(
            f"the float model ends all of its {silent} answers at once, so it cannot write its calibration set; is the chat "
            "template its own? give --calib-data, or --calib-data built-in"
        )
    found = {"end at once": silent, "repeat themselves": looping}
    return [
        f"{count} of the model's {len(entries)} texts {what}; see {FOLDER}/{FILE} in X.calibrated"
        for what, count in found.items()
        if 2 * count > len(entries)
    ]


def hold_out(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Returns the samples to calibrate on, and those to compare the result with the float model on.

    The latter are HELD_OUT of them, evenly spaced. All calibrate where there are fewer than LEAST_SAMPLES, and where none
    of the others has a picture.
    """
    count = min(HELD_OUT, len(samples))
    numbers = [n * len(samples) // count for n in range(count)]
    rest = tuple(sample for n, sample in enumerate(samples) if n not in numbers)
    checked = tuple(samples[n] for n in numbers)
    loses_pictures = any(len(s.pixel_values) for s in checked) and not any(len(s.pixel_values) for s in rest)
    return (tuple(samples) if len(samples) < LEAST_SAMPLES or loses_pictures else rest), checked


def require_pictures(calib_data: Path | None, samples: Sequence[Sample], linear: str | None) -> None:
    """Raises UserError when no sample has a picture, unless `linear`, the first whose calibration needs images, is None."""
    if samples and any(len(sample.pixel_values) for sample in samples):
        return
    if linear is not None:
        raise UserError(
            f"--calib-data {calib_data}: no sample has a picture, and how {linear} is quantized depends on them; "
            "add samples with pictures, or leave tower and projector float by --recipe"
        )
