"""Shared memory in which each child of a prefork worker keeps the start of its current run."""

from __future__ import annotations

import mmap
from struct import Struct

#: The pid of the child and the length of the message, before the message.
_HEADER = Struct("<IH")

#: Bytes of one slot. The system allocates memory only for the slots that are used.
_SLOT_BYTES = 256

#: Maximum bytes of a message.
#: If a task's id and name have 36 characters each, the message of its start has 110 bytes.
MAX_MESSAGE_BYTES = _SLOT_BYTES - _HEADER.size


class KeptStarts:
    """A slot for each child, with a message, its number and the child's pid.

    A number is unique among the messages of all children, and 0 marks an empty slot.
    A child writes the message first, and then the number in one write of 8 bytes.
    Therefore the parent sees a whole message or none, even if the child is killed.

    :param slots: number of slots.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        memory = memoryview(mmap.mmap(-1, slots * (8 + _SLOT_BYTES)))
        self._numbers = memory[: 8 * slots].cast("Q")
        self._messages = memory[8 * slots :]

    def keep(self, slot: int, number: int, pid: int, message: bytes) -> None:
        """Keep a message of at most :data:`MAX_MESSAGE_BYTES`."""
        self._numbers[slot] = 0
        first, data = slot * _SLOT_BYTES, _HEADER.pack(pid, len(message)) + message
        self._messages[first : first + len(data)] = data
        self._numbers[slot] = number

    def drop(self, slot: int) -> None:
        """Drop the message in a slot."""
        self._numbers[slot] = 0

    def numbers(self, used: int) -> dict[int, int]:
        """Return the slots of the messages in the first ``used`` slots, by message number."""
        numbers = self._numbers[: min(used, self._slots)].tolist()
        if not any(numbers):
            return {}
        return {number: slot for slot, number in enumerate(numbers) if number}

    def message(self, slot: int, number: int) -> tuple[int, bytes] | None:
        """Return the pid and the message of a slot; ``None`` if the slot has another number now."""
        first = slot * _SLOT_BYTES
        data = bytes(self._messages[first : first + _SLOT_BYTES])
        if self._numbers[slot] != number:
            return None
        pid, length = _HEADER.unpack_from(data)
        return pid, data[_HEADER.size : _HEADER.size + length]
