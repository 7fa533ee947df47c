# What the rl_*.sh do with one $seed of a $suite in its folder $run: each step once, so that a script that was killed goes
# on where it was. To be sourced. PROCESSES=2 of RL: with 1, and OMP_NUM_THREADS=1, two seeds may run side by side.

[ $# -ge 2 ] || { sed -n "4s/^# *//p" "$0" >&2; exit 2; }

imitate() { # DEMOS [OPTION OF vla train ...]; shows $tasks if there are such, else all of the suite's
    local demos=$1
    shift
    [ -e "$run/imitation.json" ] && return
    rm -rf "$run/imitation"
    ./run demos "$suite" --episodes "$demos" --seed $((seed * 20000)) --out "$run/demos" ${tasks:+--tasks $tasks}
    ./run train --dataset "$run/demos" --seed "$seed" --out "$run/imitation" "$@"
}

judge() { # POLICY NAME [OPTION OF vla eval ...]
    local policy=$1 name=$2
    shift 2
    [ -e "$run/$name.json" ] && return
    ./run eval "$policy" --suite "$suite" --no-controls --json "$run/$name.json" "$@"
}

refine() { # RECIPE FOLDER NAME MINUTES [OPTION OF vla rl ...]: until NAME is judged
    local recipe=$1 folder=$2 name=$3 minutes=$4 resume=()
    shift 4
    [ -e "$run/$name.json" ] && return
    [ -e "$run/$folder/last" ] && resume=(--resume)
    ./run rl "$recipe" --suite "$suite" --init "$run/imitation" --seed "$seed" --minutes "$minutes" \
        --processes "${PROCESSES:-2}" --workers 1 --out "$run/$folder" "${resume[@]}" "$@"
}

teach_and_refine() { # DEMOS EPISODES MINUTES SEEDS [OPTION OF vla train ...]: into $out, by $RECIPE, else the suite's own
    local demos=$1 episodes=$2 stages=$3 seeds=$4 seed run minutes recipe=${RECIPE:-$suite} shown
    shift 4
    for seed in $seeds; do
        run=$out/$seed
        imitate "$demos" "$@"
        judge "$run/imitation" imitation --episodes "$episodes"
        shown=()
        [[ $recipe == *-guided ]] && shown=(--demos "$run/demos")
        for minutes in $stages; do
            refine "$recipe" rl "rl$minutes" "$minutes" "${shown[@]}"
            judge "$run/rl/best" "rl$minutes" --episodes "$episodes"
        done
    done
}
