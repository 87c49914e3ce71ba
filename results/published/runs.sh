#!/bin/bash
# The runs beside the published curves, one after the other: days of one core. Interrupt and repeat
# the command at will: a finished run is left as it is, an interrupted one is resumed.
#
#     bash results/published/runs.sh FOLDER    # for data and runs
set -eu
folder=$(realpath -m "${1:?a folder for data and runs}")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

# The alpha of QC-FQL is not published. The first two runs try 100 and 300 on task 1 of the puzzle;
# the one with more success after 50,000 updates belongs here, for all runs of puzzle and scene.
alpha=300

run() { # NAME UPDATES SCRIPT FLAGS...
    python "$3" "${@:4}" --seed 0 --offline-steps "$2" --eval-interval 50000 --eval-episodes 50 \
        --compile --start-or-resume "$folder/$1"
}
puzzle=(--env puzzle-3x3-play-v0 --dataset "$folder/puzzle-3x3-play-v0.npz" --sparse --horizon 5)
scene=(--env scene-play-v0 --dataset "$folder/scene-play-v0.npz" --sparse --horizon 5)
antmaze=(--env antmaze-large-navigate-v0 --dataset "$folder/antmaze-large-navigate-v0.npz")

# 1: QC-FQL
if [ ! -f "$folder/puzzle-3x3-play-v0.npz" ]; then
    python results/collect_play.py puzzle-3x3-play-v0 --out "$folder"
fi
for trial in 100 300; do
    run puzzle-3x3-task1-fql-alpha$trial 50000 fql.py "${puzzle[@]}" --task 1 --alpha $trial
done
for task in 1 2 3 4 5; do
    run puzzle-3x3-task$task-fql 100000 fql.py "${puzzle[@]}" --task $task --alpha $alpha
done

# 2: Q-Flow, lambda and aggregation by its paper's first table
for task in 1 2 4; do
    run puzzle-3x3-task$task-qflow 100000 qflow.py "${puzzle[@]}" --task $task
done

# 3: QC-FQL
if [ ! -f "$folder/scene-play-v0.npz" ]; then
    python results/collect_play.py scene-play-v0 --out "$folder"
fi
for task in 2 3; do
    run scene-task$task-fql 100000 fql.py "${scene[@]}" --task $task --alpha $alpha
done

# 4: FQL in QAM's setting
if [ ! -f "$folder/antmaze-large-navigate-v0.npz" ]; then
    python results/collect_antmaze.py antmaze-large-navigate-v0 --out "$folder"
fi
run antmaze-large-task1-fql 100000 fql.py "${antmaze[@]}" --task 1 --alpha 3 \
    --num-critics 10 --q-agg mean --rho 0.5
