#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests that need one: two "nodes" of four CPUs each, partition "debug".
#
#   eval "$(tests/cluster/slurm.sh start [DIR])"    start it; sets SLURM_CONF, which every Slurm command reads
#   tests/cluster/slurm.sh stop DIR                 cancel its jobs and stop its daemons
#
# Run it as root on Debian or Ubuntu, no systemd needed. Everything it writes lies in DIR (a fresh directory under
# /tmp if none is given); a start on a DIR that is already up changes nothing. SLURM_TEST_PORT=N moves its three
# TCP ports, so that two of them can run side by side.
set -euo pipefail

NODES=(node1 node2)
PORT=${SLURM_TEST_PORT:-16817}

fail() {
    echo "slurm.sh: $*" >&2
    exit 1
}

install_missing() {
    local program
    for program in munged slurmctld slurmd srun; do
        command -v "$program" >/dev/null && continue
        # RUNLEVEL=1 keeps the packages from starting daemons of their own on the default ports.
        export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >&2
        apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2
        return
    done
}

# The process id in a pid file, if that process still lives and is the program we started: ids are used again, and a
# dead process that nobody has waited for keeps its name but no executable. Debian calls them slurmd-wlm and the like.
running() { # PROGRAM PIDFILE
    local pid
    [[ -s $2 ]] || return 1
    pid=$(cat "$2" 2>/dev/null) || return 1
    [[ $(readlink "/proc/$pid/exe") == */"$1"* ]] && echo "$pid"
}

write_config() { # DIR
    mkdir -p "$1"/{state,spool}
    # Comments sit on lines of their own: slurm.conf is also read by people who wonder what a real cluster would say.
    cat >"$1/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
# A job that was requeued waits as long as a credential may live: 20 s, where it would be 120.
AuthInfo=socket=$1/munge.socket,cred_expire=20
StateSaveLocation=$1/state
SlurmctldPidFile=$1/slurmctld.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdSpoolDir=$1/spool/%n
SlurmdPidFile=$1/slurmd.%n.pid
SlurmdLogFile=$1/slurmd.%n.log
# No cgroups and no CPU binding: neither works in a container.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
# As on many small clusters there is no accounting, so sacct answers nothing.
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Believe the CPU counts below, not the machine's, and take a node back as soon as it answers again.
SlurmdParameters=config_overrides
ReturnToService=2
# Start and requeue jobs within a second or two.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
KillWait=30
# Both nodes are this machine: one address, a port each.
NodeName=${NODES[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=4 RealMemory=2000
NodeName=${NODES[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=4 RealMemory=2000
PartitionName=debug Nodes=$(IFS=, && echo "${NODES[*]}") Default=YES MaxTime=INFINITE State=UP
CONF
}

start_munged() { # DIR
    running munged "$1/munged.pid" >/dev/null && return
    [[ -s $1/munge.key ]] || mungekey --create --keyfile="$1/munge.key" >&2
    # --force: munged would rather have its socket in a directory that everyone can enter; only root uses this one.
    munged --force --socket="$1/munge.socket" --key-file="$1/munge.key" --pid-file="$1/munged.pid" \
        --log-file="$1/munged.log" --seed-file="$1/munged.seed" 2>>"$1/start.log"
}

start_slurm() { # DIR
    local node
    export SLURM_CONF=$1/slurm.conf
    running slurmctld "$1/slurmctld.pid" >/dev/null || slurmctld >>"$1/start.log" 2>&1
    for node in "${NODES[@]}"; do
        running slurmd "$1/slurmd.$node.pid" >/dev/null || slurmd -N "$node" >>"$1/start.log" 2>&1
    done
}

wait_until_idle() { # DIR
    local attempt
    for attempt in {1..60}; do
        # A line per node that can take work; an allocated or mixed node is one that an earlier start left busy.
        [[ $(sinfo --noheader --Node --states=idle,allocated,mixed --format=%N 2>/dev/null | wc -l) -eq ${#NODES[@]} ]] &&
            return
        sleep 0.5
    done
    fail "the nodes are not up after $attempt attempts; see $1/slurmctld.log, $1/slurmd.*.log and $1/start.log"
}

start() { # [DIR]
    local dir
    [[ $EUID -eq 0 ]] || fail "start it as root: slurmd runs the jobs of other users"
    install_missing
    dir=$(realpath -m "${1:-$(mktemp -d /tmp/slurm.XXXXXX)}")
    # A path with a space cannot be written in slurm.conf, and a socket's path is at most 107 bytes long.
    [[ $dir != *[[:space:]]* && ${#dir} -lt 90 ]] || fail "$dir : choose a shorter directory without spaces"
    mkdir -p "$dir"
    [[ -s $dir/slurm.conf ]] || write_config "$dir"
    start_munged "$dir"
    start_slurm "$dir"
    wait_until_idle "$dir"
    echo "export SLURM_CONF=$dir/slurm.conf"
}

stop_one() { # PROGRAM PIDFILE
    local pid
    pid=$(running "$1" "$2") || return 0
    kill "$pid"
    for _ in {1..100}; do
        running "$1" "$2" >/dev/null || break
        sleep 0.1
    done
    running "$1" "$2" >/dev/null && fail "$1 (process $pid) does not stop"
    rm -f "$2"
}

stop() { # DIR
    local dir node
    dir=$(realpath -m "$1")
    [[ -s $dir/slurm.conf ]] || fail "$dir holds no slurm.conf"
    export SLURM_CONF=$dir/slurm.conf
    if running slurmctld "$dir/slurmctld.pid" >/dev/null; then
        # The tasks of a job outlive slurmd, so they go first, and by KILL: a task may hold SIGTERM back.
        scancel --partition=debug --state=PENDING 2>/dev/null || true # or the next of an array takes a killed one's place
        scancel --partition=debug --full --signal=KILL 2>/dev/null || true
        scancel --partition=debug 2>/dev/null || true
        for _ in {1..40}; do
            [[ -n $(squeue --noheader 2>/dev/null) ]] || break
            sleep 0.25
        done
    fi
    for node in "${NODES[@]}"; do
        stop_one slurmd "$dir/slurmd.$node.pid"
    done
    stop_one slurmctld "$dir/slurmctld.pid"
    stop_one munged "$dir/munged.pid"
}

case ${1:-} in
start) start "${2:-}" ;;
stop) [[ -n ${2:-} ]] || fail "usage: slurm.sh stop DIR" && stop "$2" ;;
*) fail "usage: slurm.sh start [DIR] | slurm.sh stop DIR" ;;
esac
