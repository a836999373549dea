#!/usr/bin/env bash
# Starts Ray on machines that are there already, with a token that everybody needs.
#
#   cluster/on_premise.sh head [OPTIONS]           on the first machine; makes the token if there is none
#   cluster/on_premise.sh token HOST...            from there: gives the token to the others, by ssh
#   cluster/on_premise.sh worker HEAD [OPTIONS]    on each of the others; HEAD is the first one's address
#
# head and worker stay in the foreground: end them with Ctrl-C or SIGTERM, and what they started ends with them. Run
# them under systemd, tmux or nohup. OPTIONS are those of `ray start`, which win over what is said here:
# `--num-cpus=8`, say, lets the head work too.
#
# Environment: RAY_AUTH_TOKEN_PATH (~/.ray/auth_token), RAY_PORT (6379), RAY_DASHBOARD_PORT (8265),
# RAY_METRICS_PORT (8080).
set -euo pipefail

token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
port="${RAY_PORT:-6379}"

usage() {
  sed -n '4,6s/^# *//p' "$0" >&2
  exit 2
}

make_token() {
  [ -s "$token" ] && return
  mkdir -p "$(dirname "$token")"
  # Readable by its owner only: whoever has it can run code on every node.
  (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$token")
  echo "made a token: $token (give it to the other machines: $0 token HOST...)"
}

need_token() {
  [ -s "$token" ] && return
  echo "error: there is no token at $token" >&2
  echo "  what to do: on the head, run '$0 token $(hostname)', or copy the head's file here with mode 600" >&2
  exit 1
}

# Read by every Ray process of this node, and handed on to those that it starts.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$token"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# Idle OpenMP threads sleep: actors that take turns share the same cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

role="${1:-}"
[ $# -gt 0 ] && shift
case "$role" in
  head)
    make_token
    echo "the dashboard is at http://127.0.0.1:${RAY_DASHBOARD_PORT:-8265} of this machine; from elsewhere:"
    echo "  ssh -L 8265:127.0.0.1:${RAY_DASHBOARD_PORT:-8265} $(hostname)"
    exec ray start --head --block --port="$port" --num-cpus=0 --num-gpus=0 \
      --dashboard-host=127.0.0.1 --dashboard-port="${RAY_DASHBOARD_PORT:-8265}" \
      --metrics-export-port="${RAY_METRICS_PORT:-8080}" "$@"
    ;;
  worker)
    [ $# -gt 0 ] || usage
    head="$1"
    shift
    need_token
    case "$head" in *:*) ;; *) head="$head:$port" ;; esac
    exec ray start --block --address="$head" --metrics-export-port="${RAY_METRICS_PORT:-8080}" "$@"
    ;;
  token)
    [ $# -gt 0 ] || usage
    need_token
    for host in "$@"; do
      # By standard input: what stands in a command line is seen by everybody on that machine.
      ssh "$host" 'umask 077 && mkdir -p ~/.ray && cat > ~/.ray/auth_token && chmod 600 ~/.ray/auth_token' < "$token"
      echo "gave the token to $host"
    done
    ;;
  *) usage ;;
esac
