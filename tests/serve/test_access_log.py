"""The access log where it cannot be written."""

from __future__ import annotations

import io
import time

from starlette.datastructures import Headers

from armillary.serve.http.access_log import AccessLog
from armillary.serve.http.exchange import Exchange


class Disk(io.StringIO):
    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_full_disk_costs_lines_and_is_told_once(caplog):
    disk = Disk()
    log = AccessLog(disk)
    for full in (False, True, True, False, True):
        disk.full = full
        log(Exchange("req-1", "GET", "/health", Headers(), time.perf_counter_ns()))
    assert disk.getvalue().count("\n") == 2
    assert [record.getMessage() for record in caplog.records] == [
        "the access log cannot be written (No space left on device): lines are lost until it can",
        "the access log is written again: 2 lines are lost",
        "the access log cannot be written (No space left on device): lines are lost until it can",
    ]


def test_a_line_that_could_not_be_written_is_not_in_the_way_of_others(caplog):
    log = AccessLog.open("/dev/full")
    for _ in range(3):
        log(Exchange("req-1", "GET", "/health", Headers(), time.perf_counter_ns()))
    assert len(caplog.records) == 1
