"""How far to read ahead of those who go on from page to page. Rules only: no reads."""

from __future__ import annotations

GROWTH = 4
STREAMS = 1024
"""How many are remembered. An access at random is the first of one, too."""


class _Stream:
    """
    Accesses that follow each other.

    :ivar next: the page behind the last of them
    :ivar until: the page behind what was asked for
    :ivar asked: pages, the last time
    """

    __slots__ = ("asked", "next", "until")

    def __init__(self, stop: int, asked: int) -> None:
        self.next = self.until = stop
        self.asked = asked


class Readahead:
    """
    Recognises accesses that continue others, of many streams at a time.

    The kernel remembers one stream for each open file, and takes a page that was asked for by a
    hint for one that nobody goes on from. From any thread.
    """

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        # By the page behind the last access, where who has to ask for each goes on; and by the
        # page behind what was asked for, where who finds the others in memory does.
        self._streams: dict[int, _Stream] = {}

    def stop(self, first: int, stop: int, most: int) -> int:
        """
        Where to stop reading, for somebody who wants the pages ``[first, stop)``. O(pages).

        When a stream needs what was not asked for yet, :data:`GROWTH` times as much is as the last
        time, up to ``most`` pages.
        """
        streams = self._streams
        # It may begin in pages that are there: accesses need not begin with a page.
        for page in range(first, stop):
            stream = streams.pop(page, None)
            if stream is not None:
                streams.pop(stream.next, None)
                streams.pop(stream.until, None)
                break
        else:
            stream = _Stream(stop, stop - first)
        if stop > stream.until:
            stream.asked = max(stream.asked, min(stream.asked * GROWTH, most))
            stream.until = max(stop, stream.until + stream.asked)
        stream.next = stop
        if len(streams) >= 2 * STREAMS:
            streams.clear()
        streams[stop] = streams[stream.until] = stream
        return stream.until
