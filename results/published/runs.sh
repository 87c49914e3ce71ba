#!/bin/bash
# The runs beside the published curves, one after the other: days of one core. Interrupt and repeat
# the command at will: a finished run is left as it is, an interrupted one is resumed.
#
#     bash results/published/runs.sh FOLDER            # for data and runs
#     bash results/published/runs.sh FOLDER NAME...    # these runs only
#
# OMP_NUM_THREADS=2 gives a run both cores of an otherwise idle machine. MATMUL_PRECISION=medium is
# up to 1.7 times as fast on some CPUs (results/speed).
set -eu
folder=$(realpath -m "${1:?a folder for data and runs}")
names=" ${*:2} "
found=
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { # NAME UPDATES SCRIPT DATASET FLAGS...
    if [[ "$names" != "  " && "$names" != *" $1 "* ]]; then
        return
    fi
    found=yes
    if [ ! -f "$folder/$4.npz" ]; then
        case $4 in
            antmaze*) python results/collect_antmaze.py "$4" --out "$folder" ;;
            *) python results/collect_play.py "$4" --out "$folder" ;;
        esac
    fi
    python "$3" --env "$4" --dataset "$folder/$4.npz" "${@:5}" --seed 0 --offline-steps "$2" \
        --eval-interval 25000 --eval-episodes 50 --compile \
        --matmul-precision "${MATMUL_PRECISION:-high}" --start-or-resume "$folder/$1"
}
puzzle=(puzzle-3x3-play-v0 --sparse --horizon 5)
scene=(scene-play-v0 --sparse --horizon 5)

# 1: QC-FQL. Table 4 of Q-chunking has alpha = 300. Tasks 3 to 5 have 100: on task 1, our run with
# 100 had 44% after 50,000 updates, with 300 2%.
for task in 1 2; do
    run puzzle-3x3-task$task-fql 100000 fql.py "${puzzle[@]}" --task $task --alpha 300
done
for task in 1 2 3 4 5; do
    run puzzle-3x3-task$task-fql-alpha100 100000 fql.py "${puzzle[@]}" --task $task --alpha 100
done
# FQL without chunks, with alpha = 100 in Table 4 of Q-chunking
run puzzle-3x3-task1-fql-single 100000 fql.py puzzle-3x3-play-v0 --sparse --task 1 --alpha 100

# 2: Q-Flow, lambda and --q-agg from the first table of its paper
for task in 1 2 4; do
    run puzzle-3x3-task$task-qflow 100000 qflow.py "${puzzle[@]}" --task $task
done

# 3: QC-FQL, alpha from Table 4 of Q-chunking
for task in 2 3; do
    run scene-task$task-fql 100000 fql.py "${scene[@]}" --task $task --alpha 300
done

# 4: FQL in QAM's setting
run antmaze-large-task1-fql 100000 fql.py antmaze-large-navigate-v0 --task 1 --alpha 3 \
    --num-critics 10 --q-agg mean --rho 0.5

if [ -z "$found" ]; then
    echo "runs.sh: no run is named$names" >&2
    exit 2
fi
