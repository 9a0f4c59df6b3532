"""Every barrier, fence, wait and commit of the kernels left out, one at a time: the machine has to report each.

The calls are found by running the kernels (``Site`` in machine.h), and left out without compiling again.
"""

from __future__ import annotations

from pathlib import Path

CSRC = Path(__file__).parents[1]

# Lines of instances.inc, with options of the compiler, whose kernels come to every such call.
KERNELS = (
    (("FORWARD", 128, 128, 1, 0), ()),
    (("BACKWARD_DKDV", 128, 128, 0, 64, 128, 2, 1), ()),
    (("BACKWARD_DKDV", 128, 128, 0, 64, 128, 2, 1), ("-DFA_STAGED=1",)),
    (("BACKWARD_DKDV", 192, 128, 0), ()),
    (("BACKWARD_DQ", 256, 256, 0), ()),  # with one stage of V: with two, its producer waits for K long enough
    (("DECODE", 128, 128, 0), ()),
    (("DECODE_GATHERED", 128, 128, 4, 0), ()),
)

# Calls that may be left out without a wrong result: file, the source that ends with the call, and why it is there.
SECOND_FENCE = "after another fence and no wait, it orders nothing more; CUTLASS, too, has one before each product"
WITHOUT_EFFECT = {
    ("consumer.cuh", "named_sync(kPingPongBarrier + consumer, 2 * kWarpgroup);"): "ping-pong is there for speed",
    ("consumer.cuh", "consumer, k.stage); mbarrier_wait(v.full(), v.parity); wgmma_fence();"): SECOND_FENCE,
    ("backward_dkdv.cuh", "auto const issue_dp = [&] { wgmma_fence();"): SECOND_FENCE,
    ("backward_dkdv.cuh", "issue_dq<C>(dq, shared, consumer, buffer); wgmma_fence();"): SECOND_FENCE,
    ("backward_dq.cuh", "k_major(shared.k(k.stage))); mbarrier_wait(v.full(), v.parity); wgmma_fence();"): SECOND_FENCE,
    ("decode.cuh", "C::BLOCK_N * CHUNKS * kRowBytes); warp_sync();"): "bytes may come before they are expected",
    (
        "backward_dkdv.cuh",
        "// the part before has been read warp_sync();",
    ): "an aligned barrier follows, and needs whole warps",
}


def is_without_effect(site: str) -> bool:
    """Whether the call at a site, as the machine names it ("consumer.cuh:53 mbarrier_wait"), is one of these."""
    name, line = site.split()[0].split(":")
    (path,) = CSRC.rglob(name)
    before = " ".join(" ".join(path.read_text().splitlines()[max(int(line) - 3, 0) : int(line)]).split())
    return any(name == file and before.endswith(source) for file, source in WITHOUT_EFFECT)
