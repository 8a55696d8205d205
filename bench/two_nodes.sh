#!/usr/bin/env bash
# runtime=dist over two "nodes" of one machine: torchrun twice, with the policy and an instance on one, an instance on
# the other. Each node has a network namespace of its own where this user may make some (root, usually), else they
# share the machine's. Further arguments are run.py's. Prints what rank 0 prints; its exit status is this one's.
#   bench/two_nodes.sh system=kunserve run.results=/tmp/two
set -uo pipefail
cd "$(dirname "$0")/.."
TORCHRUN=${TORCHRUN:-.venv/bin/torchrun}
ID=kvplane-$$
PORT=$((20000 + $$ % 20000))
OUT=$(mktemp -d)
HEAD=127.0.0.1
ADDRESS=(127.0.0.1 127.0.0.1)
INSIDE=("" "")
NODES="one network"

names=("$ID-0" "$ID-1")
leave() {
  kill "${agents[@]}" 2>/dev/null
  for name in "${names[@]}"; do ip netns delete "$name" 2>/dev/null; done
  rm -rf "$OUT"
}
agents=()
trap leave EXIT

namespaces() {
  ip netns add "${names[0]}" && ip netns add "${names[1]}" &&
    ip -n "${names[0]}" link add wire type veth peer name wire netns "${names[1]}" || return 1
  for node in 0 1; do
    ip -n "${names[$node]}" address add "10.77.0.$((node + 1))/24" dev wire &&
      ip -n "${names[$node]}" link set wire up && ip -n "${names[$node]}" link set lo up || return 1
  done
}
if namespaces 2>"$OUT/why"; then
  NODES="two network namespaces"
  HEAD=10.77.0.1
  for node in 0 1; do
    ADDRESS[node]=10.77.0.$((node + 1))
    INSIDE[node]="ip netns exec ${names[$node]} env GLOO_SOCKET_IFNAME=wire"
  done
fi
echo "two nodes, $NODES$(sed -n '1s/^/ (/;1s/$/)/p' "$OUT/why" 2>/dev/null)"

for node in 0 1; do
  # shellcheck disable=SC2086
  ${INSIDE[$node]} "$TORCHRUN" --nnodes=2 --nproc-per-node=$((2 - node)) --rdzv-backend=c10d --rdzv-id="$ID" \
    --rdzv-endpoint="$HEAD:$PORT" --rdzv-conf=is_host=$((1 - node)) --local-addr="${ADDRESS[$node]}" \
    run.py system=vllm runtime=dist model=tiny_llama hardware=cpu cluster.num_instances=2 workload=poisson \
    workload.length_scale=0.25 workload.rate=60 workload.num_requests=12 run.figures=false "$@" \
    >"$OUT/$node" 2>"$OUT/$node.err" &
  agents+=($!)
  [ "$node" = 0 ] && sleep 1
done
status=0
for node in 0 1; do wait "${agents[$node]}" || status=$?; done
cat "$OUT/0" "$OUT/1"
[ "$status" = 0 ] || cat "$OUT"/*.err >&2
exit "$status"
