"""A fleet on one machine: what the demo, the fleet tests and the benchmarks share.

Each node is a network namespace with its own containerd, agent and fsmount; the namespaces hang on one bridge in a namespace of its
own, so that nothing of the host's network is touched. A Debian docker-registry stands behind a link of given latency and rate.

Everything of one lab lives under one folder, and everything it starts names that folder or its id, so that a lab whose owner was
killed is found and removed by the next one (`agent.lab.leftovers`).
"""
