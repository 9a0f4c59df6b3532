"""A block: its warpgroups in random turns, and copies that arrive as late as they may, or at random before."""

from __future__ import annotations

import random

from fastattn.backends.triton.tools.ptx.memory import Fault
from fastattn.testing.nvcc.clocks import Ordered
from fastattn.testing.nvcc.group import SIZE, Group, Launch, Load, states

FOREVER = 20_000_000  # instructions of a block
LONGEST_TURN, EARLY = 400, 0.1


def run_block(launch: Launch, number: int, seed: int) -> int:
    """Run one block of a launch; how many instructions its warpgroups executed."""
    chance = random.Random(f"{seed} {number}")
    shared, loads = Ordered(launch.shared_bytes, launch.program.threads // 32), list[Load]()
    groups = [Group(launch, shared, loads, n, number) for n in range(launch.program.threads // SIZE)]
    while any(group.paths for group in groups):
        ready = [group for group in groups if group.ready()]
        if loads and (not ready or chance.random() < EARLY):
            done = loads.pop(chance.randrange(len(loads)))
            shared.copy_arrives(done.flat, done.where, done.data(), done.barrier)
        elif ready:
            chance.choice(ready).advance(chance.randint(1, LONGEST_TURN))
        else:
            raise Fault(f"block {number} waits for ever: {states(groups)}")
        if sum(group.executed for group in groups) > FOREVER:
            raise Fault(f"more than {FOREVER} instructions: a loop that does not end")
    if loads:
        raise Fault("a block ends before its copies do")
    return sum(group.executed for group in groups)
