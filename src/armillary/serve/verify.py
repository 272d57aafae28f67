"""Whether a schedule respects its state, and an outcome its plan: a defective one is refused, never patched."""

from __future__ import annotations

from armillary.core.errors import ArmillaryError
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Limits, Outcome, Plan, Room, Schedule, State


class ScheduleError(ArmillaryError):
    """A policy returned a schedule that its state does not allow: a defect of the policy."""


def verify(schedule: Schedule, state: State) -> dict[str, Request]:
    """The scheduled requests by id. Raises ScheduleError naming the first rule that `schedule` breaks.

    Costs time in the running and admitted sequences, not in the length of the queue (a policy that admits from its
    middle pays for the distance).
    """
    if schedule.index != state.index:
        raise ScheduleError(f"the schedule is for iteration {schedule.index}, the state for {state.index}")
    limits = state.limits
    running = {request.id: request for request in state.running}
    room = Room(state)
    preempted: set[str] = set()
    for preemption in schedule.preempted:
        victim = running.get(preemption.request_id)
        if victim is None or preemption.request_id in preempted:
            raise ScheduleError(f"request '{preemption.request_id}' is preempted but is not running, or twice")
        freed = room.give_back(victim)
        if preemption.blocks != freed:
            raise ScheduleError(f"preempting '{victim.id}' gives back {freed} blocks, not {preemption.blocks}")
        preempted.add(victim.id)

    scheduled, found = _scheduled(schedule, running, state)
    if len(scheduled) != len(schedule.entries):
        raise ScheduleError("a request has two entries in one iteration")
    for entry in schedule.entries:
        request = scheduled[entry.request_id]
        if entry.request_id in preempted:
            raise ScheduleError(f"request '{entry.request_id}' is preempted and scheduled in one iteration")
        if entry.request_id in running or not entry.start:
            _verify_entry(entry, request, limits, request.computed)
            room.free -= entry.blocks - len(request.blocks)
            continue
        hit = state.memory.hit(request)
        _verify_entry(entry, request, limits, max(request.computed, hit.tokens))
        if hit.forked and request.parent is not None and request.parent.id in preempted:
            raise ScheduleError(f"request '{request.id}' begins with the blocks of '{request.parent.id}', which is preempted")
        room.free -= room.needed(entry.blocks, hit) - len(request.blocks)
    if room.free < 0:
        raise ScheduleError(f"the schedule needs {-room.free} KV blocks more than are free")
    if not schedule.entries and (state.running or state.waiting):
        raise ScheduleError("the schedule runs nothing although there is work")
    seats = len(running) - len(preempted) + len(schedule.entries) - found
    if seats > limits.max_running:
        raise ScheduleError(f"{seats} sequences would run, the bound is {limits.max_running}")
    tokens = schedule.tokens
    alone = len(schedule.entries) == 1 and schedule.entries[0].start + tokens == scheduled[schedule.entries[0].request_id].known
    if tokens > limits.max_batch_tokens and not alone:
        raise ScheduleError(f"the iteration has {tokens} tokens, the budget is {limits.max_batch_tokens}")
    return scheduled


def _scheduled(schedule: Schedule, running: dict[str, Request], state: State) -> tuple[dict[str, Request], int]:
    """Every entry's request, found among the running ones (how many those are) and then from the head of the queue."""
    scheduled = {entry.request_id: running[entry.request_id] for entry in schedule.entries if entry.request_id in running}
    found = len(scheduled)
    missing = {entry.request_id for entry in schedule.entries} - scheduled.keys() if found < len(schedule.entries) else set()
    for request in state.waiting if missing else ():
        if request.id in missing:
            scheduled[request.id] = request
            missing.remove(request.id)
            if not missing:
                break
    if missing:
        raise ScheduleError(f"request '{min(missing)}' is scheduled but neither running nor waiting")
    return scheduled, found


def _verify_entry(entry: Entry, request: Request, limits: Limits, computed: int) -> None:
    start, count, drafts, blocks = entry.start, entry.count, entry.drafts, entry.blocks
    end, wanted = start + count, len(request.prompt) + len(request.output)
    known = end - drafts
    if start != computed:
        raise _defect(entry, f"starts at {start}, its cache ends at {computed}")
    if count < 1 or known > wanted:
        raise _defect(entry, f"computes {count} tokens, {wanted - computed} are wanted")
    if entry.sample != (known == wanted and request.sampling.max_tokens > 0):
        raise _defect(entry, "must sample exactly when it reaches the last known token")
    if drafts and not 0 <= drafts <= (len(request.drafts) if entry.sample else 0):
        raise _defect(entry, f"verifies {drafts} drafts, {len(request.drafts)} were proposed")
    if blocks < len(request.blocks) or (blocks * limits.block_size < end and blocks < limits.blocks_for(end)):
        raise _defect(entry, f"owns {blocks} KV blocks, {max(len(request.blocks), limits.blocks_for(end))} are needed")


def _defect(entry: Entry, what: str) -> ScheduleError:
    return ScheduleError(f"entry of request '{entry.request_id}' {what}")


def verify_outcome(outcome: Outcome, plan: Plan) -> None:
    """Raises ArmillaryError when an executor did not answer exactly what it was asked."""
    entries = plan.schedule.entries
    if len(outcome.sampled) != len(entries) or len(outcome.prompt_logprobs) != len(entries):
        raise ArmillaryError(f"the executor answered for {len(outcome.sampled)} entries of {len(entries)}")
    if outcome.end < outcome.start:
        raise ArmillaryError(f"the executor says that its iteration ended at {outcome.end} ns and began at {outcome.start} ns")
    failed = {index for index, _ in outcome.failed}
    for index, (entry, sampled) in enumerate(zip(entries, outcome.sampled, strict=True)):
        if len(sampled) != entry.sample and not entry.sample <= len(sampled) <= entry.sample + entry.drafts and index not in failed:
            raise ArmillaryError(
                f"the executor drew {len(sampled)} tokens for request '{entry.request_id}', which samples {int(entry.sample)} after {entry.drafts} drafts"
            )
