"""Fair sharing, priority and completion of flows, against times computed by hand. A port moves a byte per ns."""

from __future__ import annotations

from common.executors.network import Flow, Network

OUT, IN, SIDE = ("out", 0), ("in", 1), ("in", 2)


def network(**bandwidth: float) -> Network:
    net = Network()
    for port in (OUT, IN, SIDE, ("out", 3)):
        net.set_port(port, bandwidth.get(f"{port[0]}{port[1]}", 1e9))
    return net


def flow(num_bytes, ports=(OUT, IN), priority=0, not_before=0):
    return Flow(ports, num_bytes, priority, not_before, lambda now: None)


def ends(net, flows, starts=None):
    """Start flows (at 0, or at their times) and return when each ends, in their order."""
    starts = starts or [0] * len(flows)
    pending = sorted(zip(starts, range(len(flows))))
    result = {}
    while pending or len(result) < len(flows):
        due = net.next_ns()
        if pending and (due is None or pending[0][0] <= due):
            now, index = pending.pop(0)
            net.start(now, flows[index])
        else:
            for ended in net.advance(due):
                result[flows.index(ended)] = due
    return [result[index] for index in range(len(flows))]


def test_alone():
    assert ends(network(), [flow(1000)]) == [1000]


def test_the_slowest_port_decides():
    assert ends(network(in1=0.25e9), [flow(1000)]) == [4000]


def test_two_share_fairly_and_the_longer_speeds_up():
    assert ends(network(), [flow(1000), flow(3000)]) == [2000, 4000]


def test_a_late_one_slows_an_early_one():
    # 500 bytes alone, then half speed each: the first needs 1000 more, the second has 500 left at 1500.
    assert ends(network(), [flow(1000), flow(1000)], [0, 500]) == [1500, 2000]


def test_max_min_gives_what_a_bottleneck_leaves():
    # Two to IN share it; the one to SIDE gets what they leave of OUT.
    net = network(in1=0.4e9)
    flows = [flow(200), flow(200), flow(600, (OUT, SIDE))]
    assert ends(net, flows) == [1000, 1000, 1000]


def test_higher_priority_takes_all_it_can():
    assert ends(network(), [flow(1000), flow(500, priority=1)]) == [1500, 500]


def test_lower_priority_uses_what_the_higher_cannot():
    net = network(in1=0.25e9)
    assert ends(net, [flow(750, (OUT, SIDE)), flow(250, priority=1)]) == [1000, 1000]


def test_a_flow_that_waits_to_end_leaves_its_bandwidth():
    # The first has sent all at 2000 (fair share) and may not end before 5000; the second then has the port alone.
    assert ends(network(), [flow(1000, not_before=5000), flow(3000)]) == [5000, 4000]


def test_ports_that_share_nothing_do_not_meet():
    assert ends(network(), [flow(1000), flow(1000, (("out", 3), SIDE))]) == [1000, 1000]


def test_stop_forgets_a_flow():
    net = network()
    gone, stays = flow(1000), flow(1000)
    net.start(0, gone)
    net.start(0, stays)
    net.stop(1000, gone)
    assert net.next_ns() == 1500 and net.advance(1500) == [stays] and net.next_ns() is None


def test_nothing_to_send_ends_at_once():
    assert ends(network(), [flow(0), flow(1000, priority=1)]) == [0, 1000]


def test_beside_counts_senders_only():
    net = network()
    waits, sends = flow(100, not_before=9000), flow(5000)
    net.start(0, waits)
    net.start(0, sends)
    net.advance(200)
    assert net.beside((IN,)) == [sends] and net.beside((SIDE,)) == []
