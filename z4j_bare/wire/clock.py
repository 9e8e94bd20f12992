"""The difference between the brain's clock and this host's clock."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

#: Average delay of a ``Date`` header in seconds. The header omits the fraction of the second.
_DATE_FRACTION = 0.5


def offset_from_date(date: str | None, received_at: float) -> float | None:
    """Return the seconds by which the brain's clock is ahead of this host's.

    :param date: the ``Date`` header of a response; the result is ``None`` without a valid header.
    :param received_at: this host's time of the response in seconds since the epoch.
    """
    try:
        return parsedate_to_datetime(date or "").timestamp() + _DATE_FRACTION - received_at
    except (ValueError, TypeError):
        return None


def describe_offset(offset: float) -> str:
    """Return the sentence that states a difference of the clocks.

    :param offset: the seconds by which the brain's clock is ahead of this host's.
    """
    direction = "behind" if offset > 0 else "ahead of"
    return f"this host's clock is {abs(offset):.0f} s {direction} the brain's"
