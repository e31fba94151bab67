#!/usr/bin/env bash
# Runs, draws and judges the paper's figures, laptop studies and your own grids, here or on a SLURM cluster. Started
# again, it finishes what is unfinished and repeats nothing.
#
#   ./sweep.sh list                                  figures and laptop studies: runs, network sizes, hours
#   ./sweep.sh fig6                                  run it here: one run per GPU, or one per core
#   ./sweep.sh fig6 fig7 --tasks dog-run --seeds 3   a part of two figures; runs that they share are run once
#   ./sweep.sh fig11 --laptop                        a study that two cores finish in hours
#   ./sweep.sh my-grid.toml                          your own arms, tasks and seeds: docs/figures.md shows such a file
#   ./sweep.sh all --smoke --jobs 2                  every figure's grid at a toy size, into runs/smoke, two at a time
#   ./sweep.sh fig6 --print                          the plain train.py commands, to run them by other means
#   ./sweep.sh fig6 -- --precision bf16              flags after -- are passed to every train.py
#   ./sweep.sh fig6 --slurm --partition gpu --time 24:00:00 --gres=gpu:1 --jobs 50     a job array, 50 runs at a time
#
#   ./sweep.sh plot fig6 runs/                       draw a figure from whatever runs are there (plot --help)
#   ./sweep.sh claims                                the paper's claims and what the runs say (claims --help)
#
# --tasks, --seeds, --steps, --smoke and --laptop narrow the grid; --runs DIR is the folder of the runs (runs). With
# --slurm, any other --option=value is passed to sbatch. PYTHON is the interpreter (python). Output of a run:
# DIR/logs/NAME.log.
#
# A run is finished if and only if its folder holds final.pt. The rest is train.py --resume: it starts or continues a
# run; on SIGTERM or SIGUSR1 it saves and ends with status 75; if another process trains that run it ends with 76. The
# sweep keeps no state of its own, so one that was killed, or started twice, needs no repair.
#
# Exit status: 0 all runs are finished (--slurm: submitted), 1 some failed, 2 wrong arguments, 75 stopped, 76 the
# remaining runs are being trained by other processes.

set -euo pipefail

fail() { echo "sweep.sh: $*" >&2; exit 2; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "needs bash 4.4 or newer, not $BASH_VERSION"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
mode=here runs="" jobs="" grid=() figures=() sbatch_options=() more=() size=""

read_arguments() {
    while (($#)); do
        case $1 in
            --jobs=* | --runs=* | --partition=* | --time=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --jobs | --runs | --partition | --time) (($# > 1)) || fail "$1 needs a value" ;;
        esac
        case $1 in
            --jobs) [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || fail "--jobs must be from 1 to 9999, not '$2'"; jobs=$2; shift ;;
            --runs) runs=$2; shift ;;
            --partition | --time) sbatch_options+=("$1=$2"); shift ;;
            --print) mode=print ;;
            --slurm) mode=slurm ;;
            --) more=("${@:2}"); break ;;
            --smoke | --laptop) size+=" $1" grid+=("$1") ;;
            [!-]*) grid+=("$1"); [[ ${grid[*]} == *--* ]] || figures+=("$1") ;;
            --tasks* | --seeds* | --steps*) grid+=("$1") ;;  # checked by paper/studies.py
            *) sbatch_options+=("$1") ;;
        esac
        shift
    done
    ((${#grid[@]})) || fail "which figure? ./sweep.sh list names them"
    [[ $mode == slurm || ${#sbatch_options[@]} == 0 ]] ||
        fail "unknown option ${sbatch_options[0]}: options of sbatch need --slurm, flags of train.py come after --"
    [[ $runs ]] || { [[ $size == *--smoke* ]] && runs=runs/smoke || runs=runs; }
    ((${#more[@]} == 0)) || more=("$(printf '%q ' "${more[@]}")")
    grid+=("--more=${more[*]}")
}

# A run is one line: its folder's name, a tab, and the quoted arguments of train.py.
list_runs() {
    project studies runs "${grid[@]}" || exit 2
}

# A Python module of paper/, with the arguments that follow.
project() {
    env PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -m "paper.$1" "${@:2}"
}

finished() { [[ -e $runs/$1/final.pt ]]; }

# Replaces this shell with train.py for the run in line $1. The name is given, so that what runs is what was listed.
train() {
    local name=${1%%$'\t'*}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    eval "exec $die_with_me $(printf '%q ' "$python" "$here/train.py") ${1#*$'\t'}" \
        "$(printf '%q ' --runs "$runs" --name "$name" --resume)" </dev/null >>"$runs/logs/$name.log" 2>&1
}

# ---- here: as many at once as asked, each in a slot, until the list is empty ----

pid=() name=() since=()  # by slot
gpus=() failed=() next=0 elsewhere=0 ended=0 spent=0 stopping="" shown="" die_with_me=""

run_here() {
    local cores slot
    find_gpus
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    jobs=${jobs:-$((${#gpus[@]} ? ${#gpus[@]} : cores))}
    # Threads beyond the cores wait for one another, and spin meanwhile: each run would take several times as long.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
    # Linux can make the runs save and stop even if this script is killed outright.
    ! setpriv --pdeathsig TERM true 2>/dev/null || die_with_me="setpriv --pdeathsig TERM"
    echo "$done of $total runs are finished; the rest run $jobs at a time on ${#gpus[@]} GPU(s), $cores core(s)," \
        "OMP_NUM_THREADS=$OMP_NUM_THREADS; logs in $runs/logs"
    trap stop INT TERM HUP
    while ((next < ${#list[@]} || ${#pid[@]})); do
        for ((slot = 0; slot < jobs; slot++)); do
            [[ ${pid[slot]-} ]] || start_in "$slot"
        done
        show
        sleep 0.2 || true  # a signal may end it
        for slot in "${!pid[@]}"; do
            kill -0 "${pid[slot]}" 2>/dev/null || end_of "$slot"
        done
    done
    report
}

# The available GPUs, by CUDA's names.
find_gpus() {
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
        local named gpu
        IFS=, read -r -a named <<<"$CUDA_VISIBLE_DEVICES"
        for gpu in ${named[@]+"${named[@]}"}; do
            [[ $gpu =~ ^-|^NoDevFiles$ ]] && break  # CUDA ignores this entry and all that follow
            gpus+=("$gpu")
        done
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi -L | sed -n 's/^GPU.*UUID: \([^)]*\)).*/\1/p')
    fi
}

# Gives slot $1 the next unfinished run, if there is one.
start_in() {
    while ((next < ${#list[@]})); do
        local line=${list[next]}
        next=$((next + 1)) name[$1]=${line%%$'\t'*} since[$1]=$SECONDS
        if finished "${name[$1]}"; then  # another sweep has finished it
            done=$((done + 1))
            continue
        fi
        ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}
        set -m  # a process group of its own: Ctrl-C reaches only this script, which then signals each run once
        train "$line" &
        pid[$1]=$!
        set +m
        return
    done
}

# Counts the run in slot $1, which has ended.
end_of() {
    local status=0 log=$runs/logs/${name[$1]}.log
    wait "${pid[$1]}" || status=$?
    unset "pid[$1]"
    if finished "${name[$1]}"; then
        done=$((done + 1)) ended=$((ended + 1)) spent=$((spent + SECONDS - since[$1]))
    elif ((status == 76)); then
        elsewhere=$((elsewhere + 1))
    elif ((status != 75)) && [[ ! $stopping || $status != 143 ]]; then  # 143: SIGTERM before there was anything to save
        failed+=("${name[$1]}: status $status, $(tail -c 4000 "$log" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1)")
    fi
}

stop() {
    stopping=yes next=${#list[@]}
    ((${#pid[@]} == 0)) || kill -TERM "${pid[@]}" 2>/dev/null || true
    [[ ! -t 1 ]] || echo
    echo "stopping: ${#pid[@]} run(s) are saving"
}

# One line that changes in place; in a file, a new line whenever a run has ended.
show() {
    local line minutes slot went mean took=0 left=$((${#list[@]} - next + ${#pid[@]}))
    line="$done of $total done, ${#pid[@]} running, ${#failed[@]} failed, $elsewhere run elsewhere"
    if ((ended && left)) && [[ ! $stopping ]]; then  # estimated from the mean of the finished runs
        mean=$((spent / ended))
        for slot in "${!pid[@]}"; do  # minus the time of the current runs so far
            went=$((SECONDS - since[slot])) took=$((took + (went < mean ? went : mean)))
        done
        minutes=$((((mean * left - took) / (jobs < left ? jobs : left) + 59) / 60))
        line+="; about $((minutes / 60)) h $((minutes % 60)) min left"
    fi
    if [[ -t 1 ]]; then
        printf '\r\033[K%s' "$line"
    elif [[ $done/${#failed[@]}/$elsewhere != "$shown" ]]; then
        shown=$done/${#failed[@]}/$elsewhere
        echo "$line"
    fi
}

report() {
    local unfinished=$((total - done - ${#failed[@]} - elsewhere))
    [[ ! -t 1 ]] || echo
    ((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}"
    echo "$done of $total runs are finished, ${#failed[@]} failed, $elsewhere run elsewhere, $unfinished are left"
    ((done == total)) && suggest_plot || echo "the same command continues"
    ((${#failed[@]} == 0)) || exit 1
    ((unfinished == 0)) || exit 75
    ((elsewhere == 0)) || exit 76
}

# ---- on a cluster: a job array over a file of runs, written now, so that later code changes do not shift it ----

submit() {
    local config limit task job file first id="" rest=() line
    command -v sbatch >/dev/null || fail "--slurm: no sbatch here; run this on a login node, or drop --slurm"
    config=$(scontrol show config 2>/dev/null) || fail "--slurm: no SLURM controller answers (scontrol show config)"
    limit=$(sed -n 's/^MaxArraySize *= *//p' <<<"$config")  # of indices from 0
    ((limit > 1)) || fail "--slurm: this cluster allows no job arrays (MaxArraySize = $limit)"
    mkdir -p "$runs/slurm"
    exec {lock}>"$runs/slurm/lock"
    flock "$lock"  # of two simultaneous submissions, the second sees what the first has queued
    declare -A queued=()
    while read -r task job; do
        [[ ! -e $runs/slurm/$job.tsv ]] || queued[$(sed -n "$((task + 1))s/\t.*//p" "$runs/slurm/$job.tsv")]=yes
    done < <(squeue --noheader --array --user "$(id -un)" --format '%K %j')
    for line in "${list[@]}"; do
        [[ ${queued[${line%%$'\t'*}]-} ]] || rest+=("$line")
    done
    echo "$done of $total runs are finished, $((${#list[@]} - ${#rest[@]})) are queued or running," \
        "${#rest[@]} are submitted now"
    for ((first = 0; first < ${#rest[@]}; first += limit)); do
        file=$(mktemp "$runs/slurm/sweep-XXXXXX.tsv")
        printf '%s\n' "${rest[@]:first:limit}" >"$file"
        local options=(--job-name="$(basename "$file" .tsv)" --output="$runs/slurm/%x-%a.log" --open-mode=append
            --requeue --array="0-$(($(wc -l <"$file") - 1))${jobs:+%$jobs}"
            # The warning goes only to the batch shell (B), 120 s before the limit: `run_task` passes it to train.py.
            --signal=B:USR1@120)
        # One array after the other: the throttle counts within an array.
        [[ ! $jobs || ! $id ]] || options+=(--dependency="afterany:$id")
        if ! id=$(sbatch --parsable "${options[@]}" "${sbatch_options[@]}" \
            "$here/sweep.sh" --task "$file" "$here" "$python"); then
            rm "$file"
            echo "sweep.sh: sbatch took $first of ${#rest[@]} runs; the same command submits the rest later" >&2
            exit 1
        fi
        id=${id%%;*}
        echo "job $id: $(wc -l <"$file") runs of $file"
    done
}

# One task of the array $1. SLURM's own signals at the end of a job (canceled, preempted, limit reached) go to train.py
# and to this shell, which waits while train.py saves.
run_task() {
    local line run="" status=0 canceled="" warned=""
    trap 'warned=yes; [[ ! $run ]] || kill -USR1 "$run" || true' USR1
    runs=${1%/slurm/*} here=$2 python=$3
    line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")
    echo "$(date '+%F %T') $(hostname) job $SLURM_ARRAY_JOB_ID: ${line%%$'\t'*}"
    ! finished "${line%%$'\t'*}" || exit 0
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    trap 'canceled=yes' TERM
    if [[ $warned ]]; then  # too late to start
        status=75
    else
        train "$line" &
        run=$!
        while kill -0 "$run" 2>/dev/null; do  # a trap ends `wait` before the run has ended
            wait "$run" || true
        done
        wait "$run" || status=$?
    fi
    echo "$(date '+%F %T') status $status"
    # By index: the last task has the number of the array itself, and requeueing that would requeue the whole array.
    # 138: SIGUSR1 came before train.py could handle it, and there was nothing to save.
    [[ $status != 75 && $status != 138 || $canceled ]] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit "$status"
}

# ---- main ----

# The next command: one per figure.
suggest_plot() {
    local figure
    for figure in "${figures[@]}"; do
        case $figure in
            *.toml | *.json) echo "compare the arms: python plot.py $figure $runs --table" ;;
            *) echo "draw it: ./sweep.sh plot $figure $runs$size" ;;
        esac
    done
}

case ${1-} in
    "" | -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --task) run_task "${@:2}" ;;
esac
"$python" -c "import tyro" 2>/dev/null ||
    fail "$python lacks this project's packages: activate its environment, or set PYTHON"
case $1 in
    list) project studies "$@"; exit ;;
    plot) project draw "${@:2}"; exit ;;
    claims) project tables "${@:2}"; exit ;;
esac
read_arguments "$@"
runs_of_grid=$(list_runs)
mapfile -t list <<<"$runs_of_grid"
if [[ $mode == print ]]; then
    [[ $runs == runs ]] || where=" --runs $(printf %q "$runs")"
    for line in "${list[@]}"; do
        echo "python train.py ${line#*$'\t'}${where-}"
    done
    exit
fi
total=${#list[@]} done=0 unfinished=()
for line in "${list[@]}"; do
    if finished "${line%%$'\t'*}"; then done=$((done + 1)); else unfinished+=("$line"); fi
done
((done < total)) || { echo "all $total runs are finished, in $runs"; suggest_plot; exit; }
list=("${unfinished[@]}")
mkdir -p "$runs/logs"
if [[ $mode == slurm ]]; then
    runs=$(cd "$runs" && pwd)
    submit
else
    run_here
fi
