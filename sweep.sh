#!/usr/bin/env bash
# Runs the paper's figures, here or on a SLURM cluster. Started again, it finishes what is unfinished and repeats nothing.
#
#   ./sweep.sh list                                  what each figure shows, its runs, network sizes, hours
#   ./sweep.sh fig6                                  run it here: one run a GPU, or one a core
#   ./sweep.sh fig6 fig7 --tasks dog-run --seeds 3   a part of two figures; runs that they share are run once
#   ./sweep.sh all --smoke --jobs 2                  every figure's grid at a toy size, two runs at a time
#   ./sweep.sh fig6 --print                          the plain train.py commands, to run them by other means
#   ./sweep.sh fig6 -- --precision bf16              what follows -- is given to every train.py
#   ./sweep.sh fig6 --slurm --partition gpu --time 24:00:00 --gres=gpu:1 --jobs 50     a job array, 50 runs at a time
#
# --tasks, --seeds, --steps, --smoke and --laptop narrow the grid; --runs DIR is where runs go (runs). With --slurm, any
# other --option=value is sbatch's. PYTHON is the interpreter (python). Each run's output goes to DIR/logs/NAME.log.
#
# A run is finished if and only if its folder holds final.pt. The rest is train.py --resume: it starts or continues a run;
# on SIGTERM or SIGUSR1 it saves and ends with status 75; if another process trains that run it ends with 76. Nothing is
# remembered here, so a sweep that was killed, or started twice, needs no repair.
#
# Exit status: 0 all runs are finished (--slurm: submitted), 1 some failed, 2 wrong arguments, 75 stopped, 76 what is left
# is being trained by other processes.

set -euo pipefail

fail() { echo "sweep.sh: $*" >&2; exit 2; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "needs bash 4.4 or newer, not $BASH_VERSION"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
mode=here runs=runs jobs="" grid=() sbatch_options=() more=()

read_arguments() {
    while (($#)); do
        case $1 in
            --jobs=* | --runs=* | --partition=* | --time=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --jobs | --runs | --partition | --time) (($# > 1)) || fail "$1 wants a value" ;;
        esac
        case $1 in
            --jobs) [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || fail "--jobs must be from 1 to 9999, not '$2'"; jobs=$2; shift ;;
            --runs) runs=$2; shift ;;
            --partition | --time) sbatch_options+=("$1=$2"); shift ;;
            --print) mode=print ;;
            --slurm) mode=slurm ;;
            --) more=("${@:2}"); break ;;
            --tasks* | --seeds* | --steps* | --smoke | --laptop | [!-]*) grid+=("$1") ;;  # figures.py checks them
            *) sbatch_options+=("$1") ;;
        esac
        shift
    done
    ((${#grid[@]})) || fail "which figure? ./sweep.sh list names them"
    [[ $mode == slurm || ${#sbatch_options[@]} == 0 ]] || fail "unknown option ${sbatch_options[0]}: options of sbatch go" \
        "with --slurm, flags of train.py behind a --"
    ((${#more[@]} == 0)) || more=("$(printf '%q ' "${more[@]}")")
    grid+=("--more=${more[*]}")
}

# A run is one line: its folder's name, a tab, and the quoted arguments of train.py.
list_runs() {
    local names commands line
    names=$(env PYTHONPATH="$here" "$python" -m paper.figures names "${grid[@]}") || exit 2
    commands=$(env PYTHONPATH="$here" "$python" -m paper.figures commands "${grid[@]}") || exit 2
    while read -r line; do  # again what follows --: figures.py leaves out what does not belong to a run's name, as --device
        echo "${more[*]}$line"
    done <<<"$commands" | paste <(echo "$names") -
}

finished() { [[ -e $runs/$1/final.pt ]]; }

# Becomes the training of the run in line $1. The name is given, so that what runs is what was listed.
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
    # Linux can tell the runs to save and stop even if this script is killed outright.
    ! setpriv --pdeathsig TERM true 2>/dev/null || die_with_me="setpriv --pdeathsig TERM"
    echo "$done of $total runs are finished already; the rest $jobs at a time on ${#gpus[@]} GPU(s), $cores core(s)," \
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

# The GPUs at hand, by the names that CUDA knows.
find_gpus() {
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi -L | sed -n 's/^GPU.*UUID: \([^)]*\)).*/\1/p')
    fi
}

# Gives slot $1 the next unfinished run, if there is one.
start_in() {
    while ((next < ${#list[@]})); do
        local line=${list[next]}
        next=$((next + 1)) name[$1]=${line%%$'\t'*} since[$1]=$SECONDS
        if finished "${name[$1]}"; then  # by another sweep, meanwhile
            done=$((done + 1))
            continue
        fi
        ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}
        set -m  # a process group of its own: Ctrl-C reaches this script alone, which then tells each run once
        train "$line" &
        pid[$1]=$!
        set +m
        return
    done
}

# What became of the run in slot $1.
end_of() {
    local status=0 log=$runs/logs/${name[$1]}.log
    wait "${pid[$1]}" || status=$?
    unset "pid[$1]"
    if finished "${name[$1]}"; then
        done=$((done + 1)) ended=$((ended + 1)) spent=$((spent + SECONDS - since[$1]))
    elif ((status == 76)); then
        elsewhere=$((elsewhere + 1))
    elif ((status != 75)) && [[ ! $stopping || $status != 143 ]]; then  # 143: SIGTERM came before there was anything to save
        failed+=("${name[$1]}: status $status, $(tail -c 4000 "$log" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1)")
    fi
}

stop() {
    stopping=yes next=${#list[@]}
    ((${#pid[@]} == 0)) || kill -TERM "${pid[@]}" 2>/dev/null || true
    [[ ! -t 1 ]] || echo
    echo "stopping: ${#pid[@]} run(s) save what they have"
}

# One line that changes in place; in a file, a line whenever a run has ended.
show() {
    local line minutes slot went mean took=0 left=$((${#list[@]} - next + ${#pid[@]}))
    line="$done of $total done, ${#pid[@]} running, ${#failed[@]} failed, $elsewhere run elsewhere"
    if ((ended && left)) && [[ ! $stopping ]]; then  # if each takes as long as those before
        mean=$((spent / ended))
        for slot in "${!pid[@]}"; do  # less what those that run have done of it
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
    ((done == total)) || echo "the same command continues"
    ((${#failed[@]} == 0)) || exit 1
    ((unfinished == 0)) || exit 75
    ((elsewhere == 0)) || exit 76
}

# ---- on a cluster: a job array over a file of runs, written now, so that later changes of the code do not shift it ----

submit() {
    local config limit task job file first id="" rest=() line
    command -v sbatch >/dev/null || fail "--slurm: no sbatch here; run this on a login node of the cluster, or leave --slurm away"
    config=$(scontrol show config 2>/dev/null) || fail "--slurm: no SLURM controller answers (scontrol show config)"
    limit=$(sed -n 's/^MaxArraySize *= *//p' <<<"$config")  # of indices from 0
    ((limit > 1)) || fail "--slurm: this cluster allows no job arrays (MaxArraySize = $limit)"
    mkdir -p "$runs/slurm"
    exec {lock}>"$runs/slurm/lock"
    flock "$lock"  # of two submissions at once the second sees what the first has queued
    declare -A queued=()
    while read -r task job; do
        [[ ! -e $runs/slurm/$job.tsv ]] || queued[$(sed -n "$((task + 1))s/\t.*//p" "$runs/slurm/$job.tsv")]=yes
    done < <(squeue --noheader --array --user "$(id -un)" --format '%K %j')
    for line in "${list[@]}"; do
        [[ ${queued[${line%%$'\t'*}]-} ]] || rest+=("$line")
    done
    echo "$done of $total runs are finished, $((${#list[@]} - ${#rest[@]})) are queued or running, ${#rest[@]} are submitted now"
    for ((first = 0; first < ${#rest[@]}; first += limit)); do
        file=$(mktemp "$runs/slurm/sweep-XXXXXX.tsv")
        printf '%s\n' "${rest[@]:first:limit}" >"$file"
        local options=(--job-name="$(basename "$file" .tsv)" --output="$runs/slurm/%x-%a.log" --open-mode=append --requeue
            --array="0-$(($(wc -l <"$file") - 1))${jobs:+%$jobs}"
            # The warning goes to the batch shell alone (B), 120 s before the limit: `run_task` passes it to train.py.
            --signal=B:USR1@120)
        # One array after the other: the throttle counts within an array.
        [[ ! $jobs || ! $id ]] || options+=(--dependency="afterany:$id")
        id=$(sbatch --parsable "${options[@]}" "${sbatch_options[@]}" "$here/sweep.sh" --task "$file" "$here" "$python") ||
            { rm "$file"; echo "sweep.sh: sbatch took $first of ${#rest[@]} runs; the same command submits the rest later" >&2; exit 1; }
        id=${id%%;*}
        echo "job $id: $(wc -l <"$file") runs of $file"
    done
}

# One task of the array $1. SLURM's own signals at the end of a job (cancelled, preempted, limit reached) go to train.py
# and to this shell, which waits while train.py saves.
run_task() {
    local line run="" status=0 cancelled="" warned=""
    trap 'warned=yes; [[ ! $run ]] || kill -USR1 "$run" || true' USR1
    runs=${1%/slurm/*} here=$2 python=$3
    line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")
    echo "$(date '+%F %T') $(hostname) job $SLURM_ARRAY_JOB_ID: ${line%%$'\t'*}"
    ! finished "${line%%$'\t'*}" || exit 0
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    trap 'cancelled=yes' TERM
    if [[ $warned ]]; then  # too late to begin
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
    # By index: the array's last task has the number of the array, and to requeue that would be to requeue all of it.
    # 138: SIGUSR1 came before train.py could note it, and there was nothing to save.
    [[ $status != 75 && $status != 138 || $cancelled ]] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit "$status"
}

# ---- main ----

case ${1-} in
    "" | -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --task) run_task "${@:2}" ;;
esac
"$python" -c "import tyro" 2>/dev/null || fail "$python lacks this project's packages: activate its environment, or set PYTHON"
[[ $1 != list ]] || exec env PYTHONPATH="$here" "$python" -m paper.figures "$@"
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
((done < total)) || { echo "all $total runs are finished, in $runs"; exit; }
list=("${unfinished[@]}")
mkdir -p "$runs/logs"
if [[ $mode == slurm ]]; then
    runs=$(cd "$runs" && pwd)
    submit
else
    run_here
fi
