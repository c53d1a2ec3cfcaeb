#!/bin/bash
# A real SLURM on this machine, on loopback alone, for trying and testing: one controller, two nodes.
#
#   slurm/single_machine.sh start        then:  export SLURM_CONF=DIR/slurm.conf   (start prints it)
#   slurm/single_machine.sh status
#   slurm/single_machine.sh stop         ends its jobs and daemons and removes DIR; also what a crash left of it
#
# DIR, which holds all that it writes, is $STPREDICT_SLURM_DIR, by default /tmp/stpredict-slurm-USER; its three ports
# follow $STPREDICT_SLURM_PORT (26817). Needs slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge).
# Root or not; but only root can have the node names resolve, which ranks on several nodes need: it adds a line to
# /etc/hosts and takes it out again. Anybody else exports MASTER_ADDR=127.0.0.1 before submitting.
set -euo pipefail

user=$(id -un)
dir=${STPREDICT_SLURM_DIR:-/tmp/stpredict-slurm-$user}
port=${STPREDICT_SLURM_PORT:-26817}
ours=.made_by_single_machine # without it, nothing is removed
nodes=(one-a one-b)
hosts_mark="# single_machine.sh [$dir]"
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

main() {
    case "${1:-}" in
        start) start ;;
        stop) stop ;;
        status) status ;;
        *)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 2
            ;;
    esac
}

start() {
    local tool missing=()
    for tool in munged slurmctld slurmd sinfo; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    if ((${#missing[@]})); then
        echo "error: not found: ${missing[*]}; install SLURM and munge (Debian: apt-get install slurm-wlm munge)" >&2
        exit 1
    fi
    one_at_a_time
    check_free
    mkdir -p "$dir"/{munge,state}
    touch "$dir/$ours"
    chmod 755 "$dir" "$dir/munge"
    trap 'echo "error: no SLURM; after this, $0 stop. The last lines of the logs in $dir:" >&2; tail -n 3 "$dir"/*.log >&2' \
        ERR
    # A key of its own: this SLURM and a cluster's do not know each other.
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    # --force: its home is in /tmp, which others may write to.
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --seed-file="$dir/munge/seed" --log-file="$dir/munge.log" 2>>"$dir/munge.log" 9<&-
    write_config
    resolve_nodes
    slurmctld -f "$SLURM_CONF" 9<&-
    for node in "${nodes[@]}"; do
        slurmd -f "$SLURM_CONF" -N "$node" 9<&-
    done
    wait_until_idle
    trap - ERR
    echo "export SLURM_CONF=$SLURM_CONF"
}

# Two of these take no port, nor change /etc/hosts, at the same time. The lock ends with this script: daemons do not get it.
one_at_a_time() {
    exec 9</etc/hosts
    if ! flock --timeout 60 9; then
        echo "error: another $0 has been at work for a minute; fuser -v /etc/hosts says which" >&2
        exit 1
    fi
}

# One line and the end, where the folder or the ports are somebody's.
check_free() {
    local number
    if [[ -e $dir && ! -e $dir/$ours ]]; then
        echo "error: $dir is there and not of this script; set STPREDICT_SLURM_DIR to a folder that is not there" >&2
        exit 1
    elif [[ -e $dir ]] && running "$dir/slurmctld.pid" slurmctld >/dev/null; then
        echo "error: it runs already: export SLURM_CONF=$SLURM_CONF (or first: $0 stop)" >&2
        exit 1
    elif [[ -e $dir ]]; then
        echo "error: $dir is left of a SLURM that was killed; clear it away: $0 stop" >&2
        exit 1
    fi
    for number in "$port" $((port + 1)) $((port + 2)); do
        if (: <"/dev/tcp/127.0.0.1/$number") 2>/dev/null; then
            echo "error: port $number is in use (another SLURM?); set STPREDICT_SLURM_PORT to the first of three that are" \
                "free" >&2
            exit 1
        fi
    done
}

# Prints the process whose id is in the file if it is alive and the daemon of that name: after a reboot it may be
# anybody's.
running() {
    local pid
    [[ -s $1 ]] && pid=$(<"$1") && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]] && alive "$pid" && echo "$pid"
}

# What has ended is there until init has seen it, which in a container may take seconds.
alive() {
    grep -q -s '^State:[[:space:]]*[^ZX]' "/proc/$1/status"
}

status() {
    if [[ ! -e $dir/$ours ]]; then
        echo "error: no SLURM in $dir: $0 start" >&2
        exit 1
    elif ! running "$dir/slurmctld.pid" slurmctld >/dev/null; then
        echo "error: the SLURM in $dir was killed: $0 stop, then start" >&2
        exit 1
    fi
    sinfo && squeue
}

write_config() {
    local host node number=0
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
KillWait=10
# By a job's id its ranks choose the port at which they meet: that of another SLURM here is to be another.
FirstJobId=$((port % 997 * 100 + 1))
# The nodes are said to have more cores than the machine.
SlurmdParameters=config_overrides
CONF
    for node in "${nodes[@]}"; do
        number=$((number + 1))
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) CPUs=8" >>"$SLURM_CONF"
    done
    echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"
}

resolve_nodes() {
    local node
    forget_nodes # of a start that a reboot ended
    for node in "${nodes[@]}"; do
        if [[ -w /etc/hosts ]]; then
            echo "127.0.0.1 $node $hosts_mark" >>/etc/hosts
        elif ! getent hosts "$node" >/dev/null; then
            echo "note: $node does not resolve; before submitting: export MASTER_ADDR=127.0.0.1" >&2
        fi
    done
}

wait_until_idle() {
    local tries
    for ((tries = 0; tries < 150; tries++)); do
        [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null) == "${#nodes[@]}" ]] && return
        sleep 0.2
    done
    return 1
}

stop() {
    local file pid pids=()
    if [[ ! -e $dir/$ours ]]; then
        echo "error: $dir holds no SLURM that $0 started" >&2
        exit 1
    fi
    if running "$dir/slurmctld.pid" slurmctld >/dev/null; then
        timeout 10 scancel --user="$user" 2>/dev/null || true
        for _ in {1..50}; do # what has ended needs no daemon to end it
            [[ -z $(timeout 10 squeue --noheader 2>/dev/null) ]] && break
            sleep 0.2
        done
    fi
    for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munge/pid"; do
        pid=$(running "$file" "$(daemon_of "$file")") && pids+=("$pid")
    done
    end ${pids[@]+"${pids[@]}"}
    end_orphans
    one_at_a_time
    forget_nodes
    rm -rf "$dir"
}

daemon_of() {
    case "$1" in
        */slurmd-*) echo slurmd ;;
        */slurmctld.pid) echo slurmctld ;;
        *) echo munged ;;
    esac
}

end() {
    local pid
    for pid; do
        kill "$pid" 2>/dev/null || true
    done
    for pid; do
        for _ in {1..50}; do
            alive "$pid" || break
            sleep 0.2
        done
    done
}

# The jobs of daemons that were killed run on, with nobody to end them.
end_orphans() {
    local process
    for process in /proc/[0-9]*; do
        if { tr '\0' '\n' <"$process/environ" | grep -q -x -F "SLURM_CONF=$SLURM_CONF" && of_a_job "$process"; } 2>/dev/null; then
            kill -9 "${process#/proc/}" 2>/dev/null || true
        fi
    done
}

# Its processes, and the daemon that saw to them and would wait for the controller for ever.
of_a_job() {
    tr '\0' '\n' <"$1/environ" | grep -q '^SLURM_JOB_ID=' || [[ $(<"$1/comm") == slurmstepd ]]
}

forget_nodes() {
    if [[ -w /etc/hosts ]] && grep -q -F "$hosts_mark" /etc/hosts; then
        local kept # not by `sed -i`: in a container /etc/hosts is a mount and cannot be replaced
        kept=$(grep -v -F "$hosts_mark" /etc/hosts) && printf '%s\n' "$kept" >/etc/hosts
    fi
}

main "$@"
