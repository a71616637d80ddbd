"""Advice about disk traffic: settings that would cut it, and the wear of the disk."""

from collections.abc import Iterator, Mapping

from cbqstream.planning.planned import Plan

ENDURANCE = 600 * 10**12
"""Bytes that may be written to a common consumer SSD of 1 TB under its warranty: 600 TBW in the data sheets of Samsung's 970 EVO Plus, 980
PRO and 990 PRO."""
_WEAR = 0.1
"""Share of the endurance above which a run warns."""
_ABSURD = 20
"""Number of times that a run may read its source before other settings are advised."""
_CUT = 5
"""Factor by which advised settings cut the bytes read, at least."""
_TB = 10**12
_LEAST = _TB
"""Bytes that a run may read before other settings are advised."""


def is_absurd(made: Plan) -> bool:
    """Whether a run reads many times its source, and more than the page cache of a machine holds."""
    return made.bytes_read > max(_ABSURD * made.source, _LEAST)


def advice(made: Plan, smaller: Mapping[str, Plan]) -> Iterator[str]:
    """Sentences about the disk traffic of a run that should be known before it starts.

    Args:
        made: the plan of the run.
        smaller: plans with smaller settings, by the flags that select them, of which the first that helps is advised.
    """
    if is_absurd(made):
        cuts = (flags for flags, other in smaller.items() if _CUT * other.bytes_read <= made.bytes_read)
        flags = next((flags for flags in cuts if smaller[flags].exceeded is None), None)
        if flags is not None:
            other = smaller[flags]
            yield (
                f"this run reads {terabytes(made.bytes_read)} from disk, {made.bytes_read / made.source:,.0f} times its source."
                f" With {flags} it would read {terabytes(other.bytes_read)}; the result changes."
            )
    if made.bytes_written > _WEAR * ENDURANCE:
        yield (
            f"this run writes {terabytes(made.bytes_written)} to disk, {wear(made):.0%} of the endurance of a common SSD of 1 TB"
            f" ({ENDURANCE // _TB} TB)."
        )


def wear(made: Plan) -> float:
    """Share of the endurance of a common SSD that a run takes, from 0."""
    return made.bytes_written / ENDURANCE


def terabytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / _TB:,.2f} TB" if size < 10 * _TB else f"{size / _TB:,.0f} TB"
