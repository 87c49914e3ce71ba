#!/usr/bin/env bash
# SLURM on one machine: the array of jobs of sweep.py, one of which is requeued while it runs.
#
#     apt-get install slurm-wlm munge
#     bash results/sweep/check_slurm.sh > results/sweep/check_slurm.txt
#
# As root on Debian, with no SLURM or munge running. What the array writes is compared with the same
# commands run one after the other.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
mkdir "$work/spool" "$work/state"
daemons=()

stop() {
    scancel --user root
    kill "${daemons[@]}" && wait
    kill "$(cat /run/munge/munged.pid)"
    rm -rf "$work"
}
trap stop EXIT

cat > "$work/slurm.conf" << END
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES DefMemPerCPU=1000
END
export SLURM_CONF=$work/slurm.conf
install -d -o munge /run/munge
runuser -u munge -- munged
slurmctld -D 2> "$work/slurmctld.log" &
daemons+=($!)
slurmd -D 2> "$work/slurmd.log" &
daemons+=($!)
until sinfo --noheader --format=%t 2> /dev/null | grep -q idle; do sleep 0.5; done
sinfo --version

cd "$work"
flags="--scripts $root/qflow.py $root/fql.py --envs pointmaze-medium-navigate-v0 --seeds 0 1"
settings="--hidden 8 --batch-size 16 --offline-steps 1200 --eval-interval 300 --log-interval 100"
settings="$settings --eval-episodes 1"

say() { echo "$(date +%T) $*"; }
folder() { sed -n "$1p" "$2" | sed 's/.*--start-or-resume //'; }

echo "python results/sweep.py ${flags//$root\/} --print -- $settings > jobs.txt"
python "$root/results/sweep.py" $flags --run-dir array --print -- $settings > jobs.txt
echo 'sbatch --array=1-4 --requeue --wrap '\''eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p jobs.txt)"'\'
id=$(sbatch --parsable --array=1-4 --requeue --wrap 'eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p jobs.txt)"')

until [ -e "$(folder 2 jobs.txt)/checkpoint.pt" ]; do
    squeue --noheader | grep -q .
    sleep 0.2
done
# Its rows until then, with their speed: computed anew they would differ.
head -n 4 "$(folder 2 jobs.txt)/train.csv" > before.csv
grep -q steps_per_s before.csv
[ "$(wc -l < before.csv)" = 4 ]
squeue --array
say "line 2 has a checkpoint: scontrol requeue ${id}_2"
scontrol requeue "${id}_2"
sleep 5
squeue --array
seen=
while squeue --noheader --array --format='%K %T %r' > now; [ -s now ]; do
    if [ "$(cat now)" != "$seen" ]; then
        seen=$(cat now)
        say "in the queue (line, state, reason): $(paste -sd ';' now)"
    fi
    sleep 1
done
say "all have ended"

python "$root/results/sweep.py" $flags --run-dir whole --print -- $settings > whole.txt
sh whole.txt > /dev/null 2>&1
for line in 1 2 3 4; do
    one=$(folder $line jobs.txt)
    other=$(folder $line whole.txt)
    cmp "$one/eval.csv" "$other/eval.csv"
    cmp <(sed 's/,[^,]*$//' "$one/train.csv") <(sed 's/,[^,]*$//' "$other/train.csv")  # no times
    say "line $line, $(basename "$one"): eval.csv and train.csv equal the uninterrupted run's"
    grep -ahE "finished|interrupted|error" "slurm-${id}_$line.out" | sed 's/^/    /'
done
head -n 4 "$(folder 2 jobs.txt)/train.csv" | cmp - before.csv
say "line 2 has the first rows that it had before it was requeued: it was resumed"
say "line 2 once more:"
eval "$(sed -n 2p jobs.txt)" 2> /dev/null | tail -n 1
